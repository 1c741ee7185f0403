"""The differences between model families: dropout, masks of packed samples, and maps of the head's raw logits.

The loss is computed inside the head, so it must repeat the causal LM's own map of its logits; `check_logits` runs
the library's own code to see that nothing else is done. Not here: the decoder, which is the library's own.
"""

import inspect
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from dist_qft.base_model.loss import LogitMap
from dist_qft.errors import UserError
from dist_qft.quant.frozen import FrozenEmbedding

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_SCALE_KEYS = {"logit_scale": 1, "logits_scaling": -1, "lm_head_multiplier": 1}  # config key -> exponent
_CAP_KEY = "final_logit_softcapping"
_ROPES_BY_LENGTH = ("longrope", "dynamic")  # types whose frequencies depend on how long the longest sample is
_BLIND_TO_POSITIONS = ("opt",)  # families whose attention mask ignores restarting position ids
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
# In the names of rates. Noise is drawn by modules that look at their own training flag, which `silence` keeps unset on
# all but decoder layers; a router may use the same number in evaluation, too, as a threshold (PhiMoE).
_DROPOUT = re.compile("drop")
_RANDOM = re.compile("drop|jitter|noise")


def disable_dropout(config: PretrainedConfig) -> None:
    """Set every rate of dropout in a configuration to 0, so that a frozen base is a function of its input."""
    for part in (config, config.get_text_config()):
        _set_rates_to_zero(part, _DROPOUT)


def silence(causal: PreTrainedModel) -> None:
    """Leave a built model no randomness in any mode, whatever its configuration calls it.

    `train()` from now on sets only the flags of the model itself and of layers, which look at theirs when they are to
    recompute their activations; whatever else a module does in training mode, such as a router that draws its experts,
    stays off.
    """
    for module in causal.modules():
        _set_rates_to_zero(module, _RANDOM if isinstance(module, GradientCheckpointingLayer) else _DROPOUT)
        if isinstance(module, _DROPOUTS):
            module.p = 0.0
    causal.eval()

    def train(mode: bool = True) -> PreTrainedModel:
        for module in causal.modules():
            if module is causal or isinstance(module, GradientCheckpointingLayer):
                module.training = mode
        return causal

    causal.train = train  # type: ignore[method-assign]  # this model alone


def _set_rates_to_zero(part: object, names: re.Pattern[str]) -> None:
    for key, value in vars(part).items():
        if isinstance(value, float) and names.search(key):
            setattr(part, key, 0.0)


def takes_positions(decoder: nn.Module) -> bool:
    """True if a decoder's forward pass can be told the positions of its tokens."""
    parameters = inspect.signature(decoder.forward).parameters
    return "position_ids" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def learned_positions(decoder: nn.Module) -> int | None:
    """The number of positions in a decoder's table of them; None if it has no such table."""
    for path, module in decoder.named_modules():
        if isinstance(module, nn.Embedding) and re.search("pos|wpe", path.rpartition(".")[2]):
            return module.num_embeddings - int(getattr(module, "offset", 0))
    return None


def rope_warnings(config: PretrainedConfig, length: int) -> list[str]:
    """A line if samples of so many tokens change the rotary frequencies of shorter ones in the same micro-batch.

    transformers chooses the frequencies of these types once for all rows, by the largest position among them.
    """
    text = config.get_text_config()
    found = getattr(text, "rope_parameters", None)
    sets = [found] if isinstance(found, Mapping) and "rope_type" in found else list((found or {}).values())
    for each in sets:
        kind = each.get("rope_type") if isinstance(each, Mapping) else None
        if kind not in _ROPES_BY_LENGTH:
            continue
        limit = each.get("original_max_position_embeddings") or getattr(text, "max_position_embeddings", None)
        if isinstance(limit, int) and length > limit:
            return [
                f"data.max_length: {length} is more than the {limit} original positions of the base's {kind} rope; a "
                "longer sample gives its frequencies to shorter ones in its micro-batch, which otherwise have their own"
            ]
    return []


def packed_mask(config: PretrainedConfig, position_ids: Tensor, dtype: torch.dtype) -> "Tensor | BlockMask | None":
    """The attention mask to hand to the decoder, None where it makes a right one from the position ids itself."""
    if config.model_type not in _BLIND_TO_POSITIONS:
        return None
    shape_only = torch.empty((*position_ids.shape, 1), dtype=dtype, device=position_ids.device)
    return create_causal_mask(
        config=config, inputs_embeds=shape_only, attention_mask=None, past_key_values=None, position_ids=position_ids
    )


def logit_map(config: PretrainedConfig) -> LogitMap:
    """The scale and cap that a (text) configuration asks for."""
    scale = 1.0
    for key, exponent in _SCALE_KEYS.items():
        if getattr(config, key, None) is not None:
            scale *= float(getattr(config, key)) ** exponent
    cap = getattr(config, _CAP_KEY, None)
    return LogitMap(scale, None if cap is None else float(cap))


def check_logits(causal: PreTrainedModel, decoder: nn.Module, head: nn.Module, expected: LogitMap) -> LogitMap:
    """Refuse a family that does more between its decoder and its logits than `expected`.

    Runs the causal LM's forward pass, on meta, with known numbers in place of decoder and head.

    Returns:
        `expected`, or the inverse of its scale if that is what the family does, with the factor by which the family
        scales the states that it gives the head (MiniCPM3) in its scale: the head is linear.

    Raises:
        UserError: the head was given anything but a multiple of the decoder's states, or the logits are not `expected`
            of the head's.
    """
    embedding = causal.get_input_embeddings()
    assert isinstance(embedding, FrozenEmbedding), "the skeleton has replaced it"
    hidden = torch.linspace(-1, 1, embedding.embedding_dim).view(1, 1, -1)
    raw = torch.linspace(-60, 60, embedding.num_embeddings).view(1, 1, -1)
    given: list[Tensor] = []

    def project(states: Tensor) -> Tensor:
        given.append(states)
        return raw

    embedding.forward = lambda ids, **_: hidden.expand(*ids.shape, -1)  # type: ignore[method-assign]  # for one pass
    decoder.forward = lambda *args, **kwargs: _DecoderOutput((hidden,))
    head.forward = project
    try:
        logits = causal(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False).logits
    finally:
        del decoder.forward, head.forward, embedding.forward
    factor = float(given[0].flatten()[-1]) if len(given) == 1 and given[0].shape == hidden.shape else 0.0  # of 1.0
    if factor != 0.0 and torch.allclose(given[0], hidden * factor, atol=1e-6) and logits.shape == raw.shape:
        # Granite divides by what HyperCLOVA X multiplies with; 1 where the scale is before the head.
        for scale in (expected.scale, 1 / expected.scale if expected.scale else 1.0, 1.0):
            behind = replace(expected, scale=scale)
            if torch.allclose(logits.float(), behind(raw), atol=1e-4):
                return replace(behind, scale=behind.scale * factor)
    raise UserError(
        f"model.path: model type '{causal.config.model_type}' changes its states or logits around the LM head "
        f"in a way that is not supported (supported: {', '.join([*_SCALE_KEYS, _CAP_KEY])})"
    )


class _DecoderOutput(tuple):
    """Last hidden states, by index and by name; None for all other attributes of a decoder's output."""

    def __getattr__(self, name: str) -> Tensor | None:
        return self[0] if name == "last_hidden_state" else None
