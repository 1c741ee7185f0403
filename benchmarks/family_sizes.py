"""Tiny models of any type that transformers knows: sizes by the names that families give them, random weights."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from dist_qft.base_model.wrapper import auto_class
from tests.support.tiny_model import VOCABULARY, save_with_random_values

_LARGEST = 20_000_000  # parameters: a model above that is not tiny, because some sizes go by other names
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "hidden_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "intermediate_size_mlp"), 128),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "decoder_layers", "num_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token", "num_selects"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("n_group", "topk_group", "n_groups", "mamba_n_groups", "first_k_dense_replace"), 1),
    **dict.fromkeys(("linear_num_value_heads", "mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_expand", "expand"), 1),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "rotary_dim"), 8),
    "linear_num_key_heads": 2,
    "mamba_d_ssm": 64,
    "query_pre_attn_scalar": 16,
    "word_embed_proj_dim": 64,
    # Numbers that show where one of them is left out: a window shorter than a sample, scales and caps that are not 1.
    "sliding_window": 4,
    "use_sliding_window": True,
    "max_window_layers": 0,
    "logit_scale": 0.5,
    "logits_scaling": 4.0,
    "lm_head_multiplier": 0.3,
    "embedding_multiplier": 2.0,
    "final_logit_softcapping": 3.0,
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
}
_TOWER: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model"), 32),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "depth", "encoder_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "num_heads", "encoder_attention_heads"), 2),
    "out_hidden_size": 64,
    "image_size": 28,
    "patch_size": 14,
    "head_dim": 16,
    "deepstack_visual_indexes": [0],
}
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
_TURNS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
_TURNING = (
    "qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text", "glm4v_text", "glm4v_moe_text", "glm_ocr_text",
    "glmga_text", "paddleocr_vl_text", "paddleocr_vl", "ernie4_5_vl_moe_text",
)  # fmt: skip
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_CONVOLUTION = {"layer_types": ["conv", "full_attention"]}
# Hybrids get a layer with attention: without one, transformers' own caches do not work.
_OWN: dict[str, dict[str, Any]] = {
    "gemma4_text": {"pad_token_id": 0},
    "gemma4_unified_text": {"pad_token_id": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm3": _CONVOLUTION,
    "lfm3_text": _CONVOLUTION,
    "longcat_flash": {"ffn_hidden_size": 128, "expert_ffn_hidden_size": 32, "zero_expert_num": 2},
    "zamba2": {"layer_types": ["mamba", "hybrid"], "hybrid_layer_ids": [1]},
    "zaya": {"num_experts_per_tok": 1},
    "bamba": {"attn_layer_indices": [1]},
    **dict.fromkeys(_TURNING, _TURNS),
    "bailing_hybrid": {"n_group": 1, "layer_types": ["linear_attention", "full_attention"]},
    "granitemoehybrid": _LINEAR,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "mamba_dt_rank": 32},
    "kimi_linear": _LINEAR,
    "lfm2": _CONVOLUTION,
    "lfm2_moe": _CONVOLUTION,
    "olmo_hybrid": _LINEAR,
    "qwen3_next": _LINEAR,
    "qwen3_5_text": _LINEAR,
    "qwen3_5_moe_text": _LINEAR,
    "qwen4_exp_text": _LINEAR,
    "mamba2": {"head_dim": 16, "num_heads": 4},
}


def tiny_config(kind: str) -> PretrainedConfig:
    """A small configuration of a model type, as far as its sizes go by known names.

    Special tokens are none where the family allows that, so that no mask is guessed from them.
    """
    try:
        return _config(kind, dict.fromkeys(_TOKENS))
    except StrictDataclassFieldValidationError:
        return _config(kind, dict.fromkeys(_TOKENS, 0))


def _config(kind: str, tokens: dict[str, Any]) -> PretrainedConfig:
    config_class = CONFIG_MAPPING[kind]
    default = config_class()
    text, parts = default.get_text_config(), {}
    for key in default.sub_configs:
        part = getattr(default, key, None)
        if part is not None:
            sizes = _SIZES | tokens if part is text else _TOWER
            parts[key] = {"model_type": part.model_type} | _settings(part, sizes)
    return config_class(**_settings(default, _SIZES | tokens), **parts)


def _settings(config: PretrainedConfig, sizes: dict[str, Any]) -> dict[str, Any]:
    known = config.to_dict()
    found = {key: value for key, value in sizes.items() if key in known}
    if "kv_lora_rank" in known and "num_key_value_heads" in found:  # every head has keys of its own
        found["num_key_value_heads"] = found["num_attention_heads"]
    return found | _OWN.get(config.model_type, {})


def save_random(config: PretrainedConfig, folder: Path) -> None:
    """A folder as `save_pretrained` publishes it; every weight and stored buffer random, so that one left out shows."""
    build = auto_class(config).from_config
    with torch.device("meta"):  # some would not fit into memory
        parameters = sum(parameter.numel() for parameter in build(config).parameters())
    if parameters > _LARGEST:
        raise ValueError("the model is not small: some of its sizes go by other names")
    save_with_random_values(build(config), folder)
