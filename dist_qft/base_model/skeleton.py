"""A decoder of frozen layers on the meta device, built from a model's configuration; no weight is read.

The decoder stays Hugging Face's own class: only its `nn.Linear`s, its embedding and its LM head are replaced,
so every family that is built of those works, and attention, norms and caches are the library's.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from dist_qft.base_model import segment_attention, separate_samples
from dist_qft.base_model.chosen_formats import ChosenFormats
from dist_qft.base_model.conversions import Conversions
from dist_qft.base_model.dry_run import choose_attention
from dist_qft.base_model.exemptions import Exemptions
from dist_qft.base_model.family import (
    check_logits,
    disable_dropout,
    learned_positions,
    packed_mask,
    silence,
    takes_positions,
)
from dist_qft.base_model.freezing import freeze_experts, freeze_linears, freeze_tables, unquantized
from dist_qft.base_model.head import OutputHead
from dist_qft.base_model.meta_model import build_on_meta
from dist_qft.base_model.model_config import library_refusal, read_model_config
from dist_qft.base_model.stop_tokens import eos_ids
from dist_qft.base_model.stored_head import untie_if_stored
from dist_qft.base_model.weight_files import local_source
from dist_qft.base_model.wrapper import is_wrapper, keep_text_alone, text_decoder
from dist_qft.config.schema import ModelConfig, QuantizationConfig
from dist_qft.data.segments import Segments
from dist_qft.errors import UserError
from dist_qft.quant.experts import FrozenExperts
from dist_qft.quant.frozen import FrozenEmbedding, FrozenLinear, FrozenWeight
from dist_qft.sharding.engine import Units


@dataclass
class BaseModel:
    """A frozen decoder and where its parts are.

    Attributes:
        model: the Hugging Face causal LM; `generate()` works on it.
        decoder: its body, from token ids to last hidden states.
        layers: the decoder layers, in order.
        linears: module path -> frozen linear, in model order (decoder layers only).
        experts: module path -> stacked experts of a mixture, likewise.
        embedding, head: the vocabulary tables; a tied head has no table of its own.
        dtype: compute dtype.
        conversions: from the names of a checkpoint's tensors to the model's.
        layers_path: the module path of the list of decoder layers.
        segmented: attention is told where samples begin (`segment_attention`), and needs no mask.
        wrapped: whether the model is a multimodal one, of which this is the text decoder with its head.
        fingerprint: hex digest of the base's content, set by loading.
        load_peak_bytes: largest resident size of this process until the base was loaded.
        head_compared: the files were looked at for an LM head of their own when this was built.
        matrices: linear layers and experts, the packed weights that adapters may change, likewise.
        shapes: of all tensors that its files must hold, by name. Once sharded, parameters need not have these.
        buffers: shapes of the buffers that a checkpoint holds beside the parameters, by name; older files lack some.
    """

    model: PreTrainedModel
    config: PretrainedConfig
    decoder: nn.Module
    layers: list[nn.Module]
    linears: dict[str, FrozenLinear]
    experts: dict[str, FrozenExperts]
    embedding: FrozenEmbedding
    head: OutputHead
    dtype: torch.dtype
    conversions: Conversions
    layers_path: str
    segmented: bool
    wrapped: bool = False
    fingerprint: str = ""
    load_peak_bytes: int = 0
    head_compared: bool = False
    notes: list[str] = field(default_factory=list)
    matrices: dict[str, FrozenLinear | FrozenExperts] = field(init=False)
    shapes: dict[str, tuple[int, ...]] = field(init=False)
    buffers: dict[str, tuple[int, ...]] = field(init=False)

    def __post_init__(self) -> None:
        found: dict[str, FrozenLinear | FrozenExperts] = {**self.linears, **self.experts}
        self.matrices = {path: found[path] for path, _ in self.model.named_modules() if path in found}
        self.shapes = {f"{path}.weight": weight.full_shape for path, weight in self.weights().items()}
        self.shapes |= {name: tuple(parameter.shape) for name, parameter in self.dense_parameters()}
        stored = self.model.state_dict().keys()
        self.buffers = {name: tuple(b.shape) for name, b in self.model.named_buffers() if name in stored}

    @property
    def vocab_size(self) -> int:
        return self.embedding.num_embeddings

    @property
    def tied(self) -> bool:
        return self.head.tied

    @property
    def head_name(self) -> str:
        """The name of the LM head's table in the library's model."""
        return next(f"{path}.weight" for path, module in self.model.named_modules() if module is self.head)

    @property
    def units(self) -> Units:
        """The modules that an engine gathers as one."""
        own = self.head.table
        tables = [self.embedding] if own is None else [self.embedding, own]
        return Units(tables=tables, layers=self.layers, root=self.decoder)

    def ignores(self, name: str) -> bool:
        """True if the library ignores this tensor when a checkpoint holds it."""
        patterns = self.model._keys_to_ignore_on_load_unexpected or ()
        return any(re.search(pattern, name) for pattern in patterns)

    def weights(self) -> dict[str, FrozenWeight]:
        """Every packed weight by module path: linear layers, experts, vocabulary tables."""
        return {**self.linears, **self.experts, **self.tables()}

    def library_shape(self, path: str) -> tuple[str, tuple[int, ...]]:
        """The name of a packed weight in the library's model, and its shape there."""
        weight = self.weights()[path]
        *leading, rows, columns = weight.full_shape
        shape = (*leading, columns, rows) if weight.transposed else (*leading, rows, columns)
        return (path if path in self.experts else f"{path}.weight"), shape

    def as_library(self, path: str, values: Tensor) -> Tensor:
        """A packed weight's values, whole and in its own order, with the dimensions of the library's model."""
        weight = self.weights()[path]
        values = values.view(weight.full_shape)
        return values.transpose(-1, -2) if weight.transposed else values

    def tables(self) -> dict[str, FrozenEmbedding]:
        """Vocabulary tables by their checkpoint name."""
        names = {module: name for name, module in self.model.named_modules()}
        tables = {names[self.embedding]: self.embedding}
        if self.head.table is not None:
            tables[names[self.head]] = self.head.table
        return tables

    def dense_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of norms, biases and everything else that is kept as is."""
        found = []
        for path, module in self.model.named_modules():
            packed = module.packed() if isinstance(module, FrozenWeight) else {}
            # A head's bias lies beside its table, so that an engine gathers both; the library has it at the head.
            owner = path.rpartition(".")[0] if module is self.head.table else path
            found += [(f"{owner}.{n}", p) for n, p in module.named_parameters(recurse=False) if n not in packed]
        return found

    def require_positions(self, length: int) -> None:
        """UserError if samples of so many tokens are longer than the positions that the base has learned."""
        limit = learned_positions(self.decoder)
        if limit is not None and length > limit:
            raise UserError(f"data.max_length: got {length}, must be at most {limit}, the base's learned positions")

    def depth_of(self, path: str) -> int | None:
        """Index of the decoder layer that holds the module `path`."""
        for part in path.split("."):
            if part.isdigit():
                return int(part)
        return None

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor, segments: Segments | None = None) -> Tensor:
        """Last hidden states (batch, length, dim) of right-padded or packed token ids (batch, length).

        Padding lies to the right of every real token, so it needs no mask; packed samples are kept apart by `segments`
        or by position ids that restart, as far as the family can (`require_separate_samples`).

        Args:
            segments: where samples begin; None finds out from the position ids, for which a GPU waits.
        """
        more: dict[str, Any] = {"position_ids": position_ids} if takes_positions(self.decoder) else {}
        if self.segmented:
            more |= segment_attention.arguments(segments or Segments.of(position_ids))
        else:
            more["attention_mask"] = self.mask_of_samples(position_ids)
        return self.decoder(input_ids=input_ids, use_cache=False, **more).last_hidden_state

    def mask_of_samples(self, position_ids: Tensor) -> Any:
        """The mask that keeps packed samples apart where segments and position ids (b, L) do not; None elsewhere."""
        return None if self.segmented else packed_mask(self.config, position_ids, self.dtype)

    def require_separate_samples(self, device: torch.device, rows_at_once: int = 2) -> None:
        """Refuse packing for a family that lets a packed sample change the next one; see `separate_samples`."""
        separate_samples.require(self, device, rows_at_once)


def build_skeleton(model: ModelConfig, quantization: QuantizationConfig, dtype: torch.dtype) -> BaseModel:
    """The base on meta, with every linear, embedding and head replaced by its frozen form.

    Args:
        dtype: compute dtype of activations and of the dense parameters (norms, biases).

    Raises:
        UserError: unknown model type, a decoder we cannot take apart, or a shape a format cannot hold.
    """
    config, _ = read_model_config(model)
    disable_dropout(config)
    causal = build_on_meta(config, model, dtype)
    source = local_source(model)
    with library_refusal(f"model.path: model type '{config.model_type}' cannot be taken apart"):
        conversions = Conversions(causal)
        stored = conversions.apply(source)[0] if source else {}
        own_head = untie_if_stored(causal, config, stored)
        formats = ChosenFormats(quantization, stored)
        base = _take_apart(causal, config, conversions, formats, quantization.exempt, dtype)
    if own_head:
        base.notes.append(f"'{model.path}': config.json ties the LM head, the files hold another one, which counts")
    base.head_compared = source is not None
    causal.generation_config.eos_token_id = eos_ids(model, config) or None
    return base


def _layers(decoder: nn.Module, config: PretrainedConfig) -> nn.ModuleList | None:
    """The decoder's own list of layers, whatever it is called: 'layers', 'h', 'blocks'."""
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    lists = {name: child for name, child in decoder.named_children() if isinstance(child, nn.ModuleList)}
    if "layers" in lists:
        return lists["layers"]
    found = [child for child in lists.values() if len(child) == count]
    return found[0] if len(found) == 1 else None


def _take_apart(
    causal: PreTrainedModel,
    config: PretrainedConfig,
    conversions: Conversions,
    formats: ChosenFormats,
    exempt: list[str],
    dtype: torch.dtype,
) -> BaseModel:
    decoder, wrapped = text_decoder(causal), is_wrapper(causal)
    layers = _layers(decoder, config)
    if layers is None or not isinstance(causal.get_output_embeddings(), nn.Linear):
        raise UserError(
            f"model.path: model type '{config.model_type}' is not a decoder with one list of layers and an LM head"
        )
    if wrapped:
        keep_text_alone(causal, decoder)
    segmented, called = choose_attention(causal, decoder, len(layers))
    layers_path = next(name for name, module in causal.named_modules() if module is layers)
    prefix, exemptions = f"{layers_path}.", Exemptions(exempt)
    linears = freeze_linears(causal, prefix, formats, exemptions, dtype, called)
    experts = freeze_experts(causal, prefix, formats, exemptions, dtype)
    notes = unquantized(causal, prefix, [*linears.values(), *experts.values()], exemptions)
    exemptions.require_used()
    embedding, head = freeze_tables(causal, formats, dtype)
    causal.requires_grad_(False)
    silence(causal)
    head.loss_map = check_logits(causal, decoder, head, head.loss_map)
    base = BaseModel(
        model=causal,
        config=config,
        decoder=decoder,
        layers=list(layers),
        linears=linears,
        experts=experts,
        embedding=embedding,
        head=head,
        dtype=dtype,
        conversions=conversions,
        layers_path=layers_path,
        segmented=segmented,
        wrapped=wrapped,
        notes=notes,
    )
    _require_all_in_units(base)
    return base


def _require_all_in_units(base: BaseModel) -> None:
    """Refuse weights that no engine would hold, such as a vision tower's."""
    owned = {parameter for unit in [base.decoder, *base.units.tables] for parameter in unit.parameters()}
    outside = [name for name, parameter in base.model.named_parameters() if parameter not in owned]
    if outside:
        kind = base.config.model_type
        raise UserError(
            f"model.path: model type '{kind}' has weights outside its text decoder: '{outside[0]}'; must be the text "
            "model alone"
        )
