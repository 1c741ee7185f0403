"""Tiny multimodal models with random weights: wrappers around a text decoder, as transformers builds them."""

from pathlib import Path
from typing import Any

from transformers import AutoModelForMultimodalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.support.tiny_model import VOCABULARY, save_with_random_values

_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
_QWEN_TOWER = {"hidden_size": 32, "intermediate_size": 64, "depth": 1, "num_heads": 2, "out_hidden_size": 64}
_LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
# By model type: the text part's own sizes, the vision part's, and settings of the whole.
WRAPPERS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        {"query_pre_attn_scalar": 16, "sliding_window": 8},
        _TOWER | {"image_size": 28, "patch_size": 14},
        {"mm_tokens_per_image": 4},
    ),
    "gemma4": (
        {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 0},
        _TOWER,
        {},
    ),
    "mistral3": ({"model_type": "mistral"}, _TOWER | {"image_size": 28, "patch_size": 14, "head_dim": 16}, {}),
    "qwen3_vl": ({}, _QWEN_TOWER | {"deepstack_visual_indexes": [0]}, {}),
    "qwen3_5": (_LINEAR_ATTENTION, _QWEN_TOWER, {}),
}


def wrapper_config(kind: str) -> PretrainedConfig:
    text, vision, own = WRAPPERS[kind]
    return CONFIG_MAPPING[kind](text_config=_TEXT | text, vision_config=dict(vision), **own)


def save_wrapper(kind: str, folder: Path) -> Path:
    """A folder of this model type as `save_pretrained` publishes it; every weight and stored buffer is random."""
    model = AutoModelForMultimodalLM.from_config(wrapper_config(kind))
    save_with_random_values(model, folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "AnyImageProcessor"}')
    return folder
