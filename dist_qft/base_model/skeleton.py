"""From a model's configuration to a decoder of frozen layers on the meta device; no weight is read.

The decoder stays Hugging Face's own class: only its `nn.Linear`s, its embedding and its LM head are replaced,
so every family that is built of those works, and attention, norms and caches are the library's.
"""

import copy
from dataclasses import dataclass, field

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from dist_qft.base_model.chosen_formats import ChosenFormats
from dist_qft.base_model.dry_run import called_linears
from dist_qft.base_model.family import check_logits, disable_dropout, logit_map, packed_mask
from dist_qft.base_model.head import OutputHead
from dist_qft.base_model.model_config import library_refusal, read_model_config
from dist_qft.base_model.stop_tokens import eos_ids
from dist_qft.base_model.weight_files import quantized_source
from dist_qft.config.schema import ModelConfig, QuantizationConfig
from dist_qft.errors import UserError
from dist_qft.quant.frozen import FrozenEmbedding, FrozenLinear
from dist_qft.ranks.collectives import everywhere
from dist_qft.sharding.engine import Units

_COMMON_POSITIONS = 1 << 20
_LARGEST_BUFFERS = 1 << 30  # bytes


@dataclass
class BaseModel:
    """A frozen decoder and where its parts are.

    Attributes:
        model: the Hugging Face causal LM; `generate()` works on it.
        decoder: its body, from token ids to last hidden states.
        layers: the decoder layers, in order.
        linears: module path -> frozen linear, in model order (decoder layers only).
        embedding, head: the vocabulary tables; a tied head has no table of its own.
        dtype: compute dtype.
        fingerprint: hex digest of the base's content, set by loading.
        shapes: of all tensors that its files must hold, by name. Once sharded, parameters need not have these.
    """

    model: PreTrainedModel
    config: PretrainedConfig
    decoder: nn.Module
    layers: list[nn.Module]
    linears: dict[str, FrozenLinear]
    embedding: FrozenEmbedding
    head: OutputHead
    dtype: torch.dtype
    fingerprint: str = ""
    notes: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(init=False)

    def __post_init__(self) -> None:
        weights = {**self.linears, **self.tables()}
        self.shapes = {f"{path}.weight": weight.weight_shape for path, weight in weights.items()}
        self.shapes |= {name: tuple(parameter.shape) for name, parameter in self.dense_parameters()}

    @property
    def vocab_size(self) -> int:
        return self.embedding.num_embeddings

    @property
    def tied(self) -> bool:
        return self.head.tied

    @property
    def units(self) -> Units:
        """What an engine gathers as one."""
        own = self.head.table
        tables = [self.embedding] if own is None else [self.embedding, own]
        return Units(tables=tables, layers=self.layers, root=self.decoder)

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
            packed = module.packed() if isinstance(module, FrozenLinear | FrozenEmbedding) else {}
            found += [(f"{path}.{n}", p) for n, p in module.named_parameters(recurse=False) if n not in packed]
        return found

    def depth_of(self, path: str) -> int | None:
        """Index of the decoder layer that holds the module `path`."""
        for part in path.split("."):
            if part.isdigit():
                return int(part)
        return None

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Last hidden states (batch, length, dim) of right-padded or packed token ids (batch, length).

        Padding lies to the right of every real token, so it needs no mask; packed samples are kept apart by position
        ids that restart, as far as the family can (`require_separate_samples`).
        """
        mask = packed_mask(self.config, position_ids, self.dtype)
        output = self.decoder(input_ids=input_ids, position_ids=position_ids, attention_mask=mask, use_cache=False)
        return output.last_hidden_state

    @torch.no_grad()
    def require_separate_samples(self, device: torch.device) -> None:
        """Refuse packing for a family that lets a packed sample change the next one. Collective; needs weights.

        Raises:
            UserError: as layers that carry a state along the row (convolutions, state spaces) do.
        """
        token = torch.arange(4, device=device) % self.vocab_size
        rows = torch.stack([token, token.roll(1)])
        rows[:, 2:] = token[:2]
        states = self.hidden_states(rows, torch.tensor([[0, 1, 0, 1]], device=device).expand(2, -1))
        tolerance = 1e-4 if self.dtype == torch.float32 else 1e-2
        if (states[0, 2:] - states[1, 2:]).abs().max() > tolerance * states.abs().max():
            kind = self.config.model_type
            raise everywhere(
                UserError(f"data.packing: model type '{kind}' cannot keep packed samples apart; set it to false")
            )


def build_skeleton(model: ModelConfig, quantization: QuantizationConfig, dtype: torch.dtype) -> BaseModel:
    """The base on meta, with every linear, embedding and head replaced by its frozen form.

    Args:
        dtype: compute dtype of activations and of the dense parameters (norms, biases).

    Raises:
        UserError: unknown model type, a decoder we cannot take apart, or a shape a format cannot hold.
    """
    config, _ = read_model_config(model)
    disable_dropout(config)
    causal = _build_on_meta(config, model, dtype)
    formats = ChosenFormats(quantization, quantized_source(model), causal.base_model_prefix)
    with library_refusal(f"model.path: model type '{config.model_type}' cannot be taken apart"):
        base = _take_apart(causal, config, formats, quantization.exempt, dtype)
    causal.generation_config.eos_token_id = eos_ids(model, config) or None
    return base


def _take_apart(
    causal: PreTrainedModel, config: PretrainedConfig, formats: ChosenFormats, exempt: list[str], dtype: torch.dtype
) -> BaseModel:
    decoder = causal.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or causal.get_output_embeddings() is None:
        raise UserError(f"model.path: model type '{config.model_type}' is not a decoder with 'layers' and an LM head")
    called = called_linears(causal, decoder)
    linears = _freeze_linears(causal, layers, formats, exempt, dtype, called)
    embedding, head = _freeze_tables(causal, formats, dtype)
    causal.requires_grad_(False)
    causal.eval()
    check_logits(causal, decoder, head, head.loss_map)
    base = BaseModel(causal, config, decoder, list(layers), linears, embedding, head, dtype)
    _require_all_in_units(base)
    base.notes += _unquantized(base)
    return base


def _build_on_meta(config: PretrainedConfig, model: ModelConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The library's model with parameters on meta and real buffers: rotary frequencies are computed, not loaded."""
    with library_refusal(f"model.path: cannot build '{config.model_type}'"):
        _refuse_huge_buffers(config)
        try:
            # The random initialization would only be thrown away, and takes most of the time even on meta.
            with no_init_weights(), init_empty_weights(include_buffers=False):
                return _causal_lm(config, model.attention, dtype)
        except (ValueError, ImportError) as error:
            if "attention implementation" in str(error) or "flash" in str(error).lower():
                key = f"model.attention: '{model.attention}'"
                raise UserError(f"{key} does not work for model type '{config.model_type}'; try 'eager'") from error
            raise


def _causal_lm(config: PretrainedConfig, attention: str, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype, trust_remote_code=False)


def _refuse_huge_buffers(config: PretrainedConfig) -> None:
    """Refuse a configuration whose buffers, such as tables of positions, would not fit into memory.

    Only where a number of positions makes that possible, since it takes a second model, all of it on meta.
    """
    positions = [value for key, value in config.to_dict().items() if "position" in key or key == "n_ctx"]
    if max((value for value in positions if isinstance(value, int)), default=0) <= _COMMON_POSITIONS:
        return
    with no_init_weights(), torch.device("meta"):
        total = sum(buffer.nbytes for buffer in _causal_lm(copy.deepcopy(config), "eager", torch.float32).buffers())
    if total > _LARGEST_BUFFERS:
        raise UserError(
            f"model.path: model type '{config.model_type}' with {max(positions):,} positions has tables of "
            f"{total / 2**30:,.0f} GiB; lower the number in config.json"
        )


def _freeze_linears(
    causal: PreTrainedModel,
    layers: nn.ModuleList,
    formats: ChosenFormats,
    exempt: list[str],
    dtype: torch.dtype,
    called: set[nn.Module] | None,
) -> dict[str, FrozenLinear]:
    """Replace the decoder layers' linears; those that the family's code never calls as layers (`called`) stay."""
    paths = {module: name for name, module in causal.named_modules()}
    prefix = paths[layers] + "."
    unused = set(exempt)
    frozen: dict[str, FrozenLinear] = {}
    faults = []
    for path, module in [(n, m) for n, m in causal.named_modules() if n.startswith(prefix)]:
        if type(module) is not nn.Linear:
            continue
        matches = {pattern for pattern in exempt if path == pattern or path.rsplit(".", 1)[-1] == pattern}
        unused -= matches
        if called is not None and module not in called:
            continue
        chosen = formats.linear(path, exempt=bool(matches))
        try:
            chosen.check((module.out_features, module.in_features), path)
        except UserError as error:
            faults.append(str(error))
            continue
        frozen[path] = FrozenLinear(
            module.in_features, module.out_features, chosen, bias=module.bias is not None, dtype=dtype
        )
        causal.set_submodule(path, frozen[path])
    if unused:
        raise UserError(f"quantization.exempt: no linear layer is called {', '.join(map(repr, sorted(unused)))}")
    if faults:
        more = f" (and {len(faults) - 1} more layers)" if len(faults) > 1 else ""
        raise UserError(faults[0] + more)
    if not frozen:
        raise UserError(f"model type '{causal.config.model_type}' has no nn.Linear in its decoder layers")
    return frozen


def _freeze_tables(
    causal: PreTrainedModel, formats: ChosenFormats, dtype: torch.dtype
) -> tuple[FrozenEmbedding, OutputHead]:
    paths = {module: name for name, module in causal.named_modules()}
    source, lm_head = causal.get_input_embeddings(), causal.get_output_embeddings()
    if not isinstance(source, nn.Embedding) or not isinstance(lm_head, nn.Linear):
        raise UserError(
            f"model type '{causal.config.model_type}': got {type(source).__name__} and {type(lm_head).__name__} as "
            "embedding and LM head, must be nn.Embedding and nn.Linear"
        )
    scale = getattr(source, "embed_scale", None)
    shape = (source.num_embeddings, source.embedding_dim)
    embedding = FrozenEmbedding(
        *shape,
        formats.table(paths[source], shape),
        dtype=dtype,
        padding_idx=source.padding_idx,
        scale=None if scale is None else float(scale),
    )
    causal.set_input_embeddings(embedding)
    config = causal.config.get_text_config()
    own = None
    if not config.tie_word_embeddings:
        shape = (lm_head.out_features, lm_head.in_features)
        own = FrozenEmbedding(*shape, formats.table(paths[lm_head], shape), dtype=dtype)
    if lm_head.bias is not None:
        raise UserError(f"model type '{config.model_type}': an LM head with a bias is not supported")
    # The causal LM applies its own scale and cap when generating; the loss, computed inside the head, must too.
    head = OutputHead(embedding, own, loss_map=logit_map(config))
    causal.set_output_embeddings(head)
    return embedding, head


def _require_all_in_units(base: BaseModel) -> None:
    """Refuse weights that no engine would hold, such as a vision tower's."""
    owned = {parameter for unit in [base.decoder, *base.units.tables] for parameter in unit.parameters()}
    outside = [name for name, parameter in base.model.named_parameters() if parameter not in owned]
    if outside:
        kind = base.config.model_type
        raise UserError(f"model.path: model type '{kind}' has weights outside its text decoder: '{outside[0]}'")


def _unquantized(base: BaseModel) -> list[str]:
    """A note on matrices of the decoder layers that are no `nn.Linear`, such as a mixture's stacked experts."""
    packed = {parameter for linear in base.linears.values() for parameter in linear.packed().values()}
    dense = [p for layer in base.layers for p in layer.parameters() if p not in packed and p.dim() > 1]
    if not dense:
        return []
    count = sum(parameter.numel() for parameter in dense)
    return [f"{count:,} weights of the decoder layers are not in linear layers and stay unquantized"]
