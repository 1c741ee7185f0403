"""Frozen layers put into a Hugging Face model for weights whose formats are already known."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dist_qft.base_model.head import project
from dist_qft.base_model.mixtures import compute_packed_experts, expert_stacks
from dist_qft.base_model.quantized_folder import Described
from dist_qft.base_model.sources import rows_and_columns
from dist_qft.base_model.stored_head import ties_head
from dist_qft.errors import CorruptFileError
from dist_qft.quant.frozen import FrozenEmbedding, FrozenLinear


class FrozenHead(FrozenEmbedding):
    """An LM head with a table of its own: hidden states in, logits out."""

    def forward(self, hidden: Tensor) -> Tensor:  # type: ignore[override]  # states, not ids
        return super().forward(hidden, use=project)


class TiedHead(nn.Module):
    """An LM head that reads the table of the input embedding."""

    def __init__(self, embedding: FrozenEmbedding) -> None:
        super().__init__()
        self._table = [embedding]  # in a list: not registered a second time

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits (..., vocabulary) of hidden states (..., dim)."""
        return self._table[0](hidden, use=project)


def freeze_described(model: PreTrainedModel, weights: Mapping[str, Described], dtype: torch.dtype) -> None:
    """Replace modules of a model on meta by frozen ones, also on meta, whose parameters are the packed tensors.

    Args:
        weights: format and shape, (out_features, in_features) or for a stack of experts (experts, out_features,
            in_features), by module path; every other module stays as it is.
        dtype: compute dtype.

    Raises:
        CorruptFileError: a path that is no linear layer or embedding of this shape in the model.
    """
    head, tied = model.get_output_embeddings(), ties_head(model)
    stacks = {stack.path: stack for stack in expert_stacks(model) if stack.path in weights}
    for path, stack in stacks.items():
        format, shape = weights[path]
        if tuple(shape) != stack.shape:
            raise CorruptFileError(f"quantization_config: '{path}' is not a stack of experts of {list(shape)}")
        stack.freeze(format, dtype)
    if stacks:
        compute_packed_experts(model)
    for path, (format, shape) in weights.items():
        if path in stacks:
            continue
        module = _module(model, path, shape)
        rows, columns = rows_and_columns(shape)
        frozen: nn.Module
        if isinstance(module, nn.Embedding):
            frozen = FrozenEmbedding(rows, columns, format, dtype, padding_idx=module.padding_idx, scale=_scale(module))
        elif module is head:
            frozen = FrozenHead(rows, columns, format, dtype, bias=module.bias is not None)
        else:
            frozen = FrozenLinear(columns, rows, format, module.bias is not None, dtype)
        model.set_submodule(path, frozen)
    table = model.get_input_embeddings()
    if tied and isinstance(table, FrozenEmbedding):
        model.set_output_embeddings(TiedHead(table))
        for part in model.modules():
            if isinstance(part, PreTrainedModel):
                part.all_tied_weights_keys = {}  # there is no parameter to tie any more


def _module(model: PreTrainedModel, path: str, shape: tuple[int, ...]) -> nn.Linear | nn.Embedding | Conv1D:
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise CorruptFileError(f"quantization_config: the model has no module '{path}'") from None
    wanted = tuple(reversed(shape)) if isinstance(module, Conv1D) else tuple(shape)
    if not isinstance(module, nn.Linear | nn.Embedding | Conv1D) or tuple(module.weight.shape) != wanted:
        raise CorruptFileError(f"quantization_config: '{path}' is not a linear layer or embedding of {list(shape)}")
    return module


def _scale(embedding: nn.Module) -> float | None:
    """The factor of embeddings that scale the rows they look up; a plain number, which a buffer on meta is not."""
    scale = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", None))
    return None if scale is None else float(scale)
