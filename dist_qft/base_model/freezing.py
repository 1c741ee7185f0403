"""A decoder's weights replaced by frozen ones on the meta device: linear layers, experts, vocabulary tables."""

import copy
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dist_qft.base_model.chosen_formats import ChosenFormats
from dist_qft.base_model.exemptions import Exemptions
from dist_qft.base_model.family import logit_map
from dist_qft.base_model.head import OutputHead
from dist_qft.base_model.mixtures import compute_packed_experts, expert_stacks, gates
from dist_qft.base_model.stored_head import ties_head
from dist_qft.errors import UserError
from dist_qft.quant.experts import FrozenExperts
from dist_qft.quant.formats import Format
from dist_qft.quant.frozen import FrozenEmbedding, FrozenLinear, FrozenWeight

_LARGEST_REST = 0.05  # share of the decoder layers' weights that may stay floats unsaid
_NAMED = 3  # weights that a message lists


def freeze_linears(
    causal: PreTrainedModel,
    prefix: str,
    formats: ChosenFormats,
    exemptions: Exemptions,
    dtype: torch.dtype,
    called: set[nn.Module] | None,
) -> dict[str, FrozenLinear]:
    """Replace the linear layers under `prefix`.

    Layers that the family's code never calls (they are not in `called`) and layers that choose among experts stay.
    """
    frozen: dict[str, FrozenLinear] = {}
    faults = []
    kept = gates(causal)
    for path, module in [(n, m) for n, m in causal.named_modules() if n.startswith(prefix)]:
        if not computes_linear(module):
            continue
        exempt = exemptions.cover(path)
        if module in kept or (called is not None and module not in called):
            continue
        chosen = formats.linear(path, exempt=exempt)
        transposed = isinstance(module, Conv1D)
        inputs, outputs = module.weight.shape if transposed else reversed(module.weight.shape)
        if fault := _fault(chosen, (outputs, inputs), path):
            faults.append(fault)
            continue
        biased = module.bias is not None
        frozen[path] = FrozenLinear(inputs, outputs, chosen, bias=biased, dtype=dtype, transposed=transposed)
        causal.set_submodule(path, frozen[path])
    _refuse(faults)
    if not frozen:
        raise UserError(
            f"model.path: model type '{causal.config.model_type}' has no linear layer in its decoder layers"
        )
    return frozen


def freeze_experts(
    causal: PreTrainedModel, prefix: str, formats: ChosenFormats, exemptions: Exemptions, dtype: torch.dtype
) -> dict[str, FrozenExperts]:
    """Replace the stacks of experts under `prefix`."""
    frozen: dict[str, FrozenExperts] = {}
    faults = []
    for stack in [stack for stack in expert_stacks(causal) if stack.path.startswith(prefix)]:
        chosen = formats.linear(stack.path, exempt=exemptions.cover(stack.path))
        if fault := _fault(chosen, stack.shape[1:], stack.path):
            faults.append(fault)
        else:
            frozen[stack.path] = stack.freeze(chosen, dtype)
    _refuse(faults)
    if frozen:
        compute_packed_experts(causal)
    return frozen


def freeze_tables(
    causal: PreTrainedModel, formats: ChosenFormats, dtype: torch.dtype
) -> tuple[FrozenEmbedding, OutputHead]:
    """Replace the embedding and the LM head."""
    paths = {module: name for name, module in causal.named_modules()}
    source, lm_head = causal.get_input_embeddings(), causal.get_output_embeddings()
    if not isinstance(source, nn.Embedding) or not isinstance(lm_head, nn.Linear):
        raise UserError(
            f"model type '{causal.config.model_type}': got {type(source).__name__} and {type(lm_head).__name__} as "
            "embedding and LM head, must be nn.Embedding and nn.Linear"
        )
    scale, biased = getattr(source, "embed_scale", None), lm_head.bias is not None
    require_lookup(source, 1.0 if scale is None else float(scale), causal.config.model_type)
    shape = (source.num_embeddings, source.embedding_dim)
    embedding = FrozenEmbedding(
        *shape,
        formats.table(paths[source], shape),
        dtype=dtype,
        padding_idx=source.padding_idx,
        scale=None if scale is None else float(scale),
    )
    for name, module in source.named_children():
        embedding.follow(name, module)
    tied = ties_head(causal)
    causal.set_input_embeddings(embedding)
    config = causal.config.get_text_config()
    own = None
    if not tied:
        shape = (lm_head.out_features, lm_head.in_features)
        own = FrozenEmbedding(*shape, formats.table(paths[lm_head], shape), dtype=dtype, bias=biased)
    elif biased:
        raise UserError(
            f"model.path: model type '{config.model_type}' has an LM head with a bias that shares the embedding's "
            "table, which is not supported"
        )
    # The causal LM applies its own scale and cap when generating; the loss, computed inside the head, must too.
    head = OutputHead(embedding, own, loss_map=logit_map(config))
    causal.set_output_embeddings(head)
    return embedding, head


def unquantized(
    causal: PreTrainedModel, prefix: str, weights: Iterable[FrozenWeight], exemptions: Exemptions
) -> list[str]:
    """A note on matrices of the decoder layers that no format holds, such as a router's.

    Raises:
        UserError: they are more than 5 % of the layers' weights, some of them are not exempt, and the base is to be
            quantized at all.
    """
    frozen = list(weights)
    packed = {parameter for weight in frozen for parameter in weight.packed().values()}
    rest = {n: p for n, p in causal.named_parameters() if n.startswith(prefix) and p not in packed and p.dim() > 1}
    if not rest:
        return []
    named = [name for name in rest if not exemptions.cover(name)]
    count = sum(parameter.numel() for parameter in rest.values())
    quantized = sum(w.weight_shape[0] * w.weight_shape[1] for w in frozen if w.format.name != "dense")
    dense = sum(w.weight_shape[0] * w.weight_shape[1] for w in frozen if w.format.name == "dense")
    share = count / (count + quantized + dense)
    if quantized and named and share > _LARGEST_REST:
        more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
        raise UserError(
            f"quantization: {count:,} weights, {share:.0%} of the decoder layers, are in no linear layer and would "
            f"stay unquantized: {', '.join(named[:_NAMED])}{more}; name them in quantization.exempt to accept that"
        )
    return [f"{count:,} weights of the decoder layers are not in linear layers and stay unquantized"]


def computes_linear(module: nn.Module) -> bool:
    """True if a module is a linear layer, GPT-2's `Conv1D`, or computes the same by code of its own, as Falcon's."""
    kind = type(module)
    if kind in (nn.Linear, Conv1D) or not issubclass(kind, nn.Linear):
        return kind in (nn.Linear, Conv1D)
    generator = torch.Generator().manual_seed(0)
    probe, x = nn.Linear(3, 2), torch.randn(4, 3, generator=generator)
    try:
        return torch.allclose(kind.forward(probe, x), probe(x), atol=1e-6)
    except Exception:  # it needs more than a linear layer has
        return False


@torch.no_grad()
def require_lookup(table: nn.Embedding, scale: float, kind: str) -> None:
    """Refuse an embedding (on meta) whose code does more than look rows up, scale them and apply its child modules.

    Its code is run on a table of a few random rows.

    Raises:
        UserError: the result is another one, or the code needs more than token ids.
    """
    probe = copy.deepcopy(table)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, table.embedding_dim, generator=generator)
    probe.weight = nn.Parameter(values, requires_grad=False)
    for child in probe.children():
        child.to_empty(device="cpu").float()
        for parameter in child.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    ids = torch.tensor([[2, 1, 3]])
    expected = values[ids] * scale
    for child in probe.children():
        expected = child(expected)
    try:
        equal = torch.allclose(probe(ids).float(), expected, rtol=1e-2, atol=1e-4)  # a scale may be rounded
    except Exception:  # it needs more than ids
        equal = False
    if not equal:
        raise UserError(
            f"model.path: model type '{kind}' does more with its token embeddings ({type(table).__name__}) than scale "
            "and normalize them, which is not supported"
        )


def _fault(format: Format, shape: tuple[int, int], path: str) -> str | None:
    try:
        format.check(shape, path)
    except UserError as error:
        return str(error)
    return None


def _refuse(faults: list[str]) -> None:
    if faults:
        more = f" (and {len(faults) - 1} more layers)" if len(faults) > 1 else ""
        raise UserError(faults[0] + more)
