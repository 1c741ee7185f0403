"""The library's own model built from a configuration: parameters on the meta device, buffers real."""

import copy
import re

import torch
from accelerate import init_empty_weights
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.quantizers.base import _assign_is_quantized

from dist_qft.base_model.attention import check_attention
from dist_qft.base_model.model_config import library_refusal
from dist_qft.base_model.wrapper import attention_by_part, auto_class
from dist_qft.config.schema import ModelConfig
from dist_qft.errors import UserError

_COMMON_POSITIONS = 1 << 20
_LARGEST_BUFFERS = 1 << 30  # bytes


def build_on_meta(config: PretrainedConfig, model: ModelConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The library's model with parameters on meta and real buffers: rotary frequencies are computed, not loaded."""
    check_attention(model)
    with library_refusal(f"model.path: cannot build '{config.model_type}'"):
        _refuse_huge_buffers(config)
        try:
            # The random initialization would only be thrown away, and takes most of the time even on meta.
            with no_init_weights(), init_empty_weights(include_buffers=False):
                causal = _causal_lm(config, model.attention, dtype)
        except (ValueError, ImportError) as error:
            if "attention implementation" in str(error) or "flash" in str(error).lower():
                key = f"model.attention: '{model.attention}'"
                raise UserError(f"{key} does not work for model type '{config.model_type}'; try 'eager'") from error
            if "Unrecognized configuration class" in str(error):
                raise UserError(f"model.path: {_no_causal_lm(config)}") from error
            raise
    _keep_in_float32(causal, dtype)
    # The mark of models whose layers have no plain `weight`: where a family would multiply by a layer's weight
    # (Jamba's dt_proj) or asks for its dtype, it then calls the layer.
    _assign_is_quantized(causal)
    return causal


def _no_causal_lm(config: PretrainedConfig) -> str:
    return f"model type '{config.model_type}' has no causal language model in transformers"


def _keep_in_float32(causal: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the few tensors their float32 that the library keeps in it whatever the model's dtype."""
    for part, kept in causal._get_dtype_plan(dtype).items():
        pattern = re.compile(rf"(^|\.){part}(\.|$)")
        for name, tensor in [*causal.named_parameters(), *causal.named_buffers()]:
            if pattern.search(name):
                tensor.data = tensor.data.to(kept)


def _causal_lm(config: PretrainedConfig, attention: str, dtype: torch.dtype) -> PreTrainedModel:
    return auto_class(config).from_config(
        config, attn_implementation=attention_by_part(config, attention), dtype=dtype, trust_remote_code=False
    )


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
