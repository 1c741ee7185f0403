"""The models that both sides load: dense Hugging Face folders, made once and kept in the cache.

`smollm2` is the real SmolLM2-135M, dequantized from its GGUF file by transformers; `llama-1b` has random weights in the
shape of TinyLlama-1.1B, `qwen3-moe` in that of a Qwen3-MoE of half a billion weights; `tiny` and `tiny-moe` are for
trying the benchmarks out.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3MoeConfig

from dist_qft.errors import UserError

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

_LLAMAS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "vocab_size": 1024},
    "llama-1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
    | {"num_key_value_heads": 4, "vocab_size": 32000},
}
_MIXTURES: dict[str, dict[str, Any]] = {
    "tiny-moe": {"hidden_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "head_dim": 64, "num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 1024},
    "qwen3-moe": {"hidden_size": 1024, "moe_intermediate_size": 384, "num_hidden_layers": 12, "num_attention_heads": 16}
    | {"num_key_value_heads": 4, "head_dim": 64, "num_experts": 32, "num_experts_per_tok": 4, "vocab_size": 32000},
}
NAMES = ("smollm2", *_LLAMAS, *_MIXTURES)


def dense_folder(name: str) -> Path:
    """The folder of a model of NAMES, made if it is not there; UserError if its GGUF file is missing."""
    folder = cache() / "bench" / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    build: Callable[[], PreTrainedModel] = _smollm2 if name == "smollm2" else lambda: _random_model(name)
    unfinished = folder.with_name(f".tmp-{name}-{os.getpid()}")
    build().save_pretrained(unfinished)
    unfinished.rename(folder)  # so that a folder that is there is complete
    return folder


def product_weights(folder: Path) -> int:
    """Weights of a dense model that a token is multiplied with: its matrices and, once, its LM head."""
    shapes: dict[str, list[int]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping
    if "lm_head.weight" in shapes:
        del shapes["model.embed_tokens.weight"]
    return sum(math.prod(shape) for shape in shapes.values() if len(shape) == 2)


def cache() -> Path:
    """The folder in which models are kept: $DIST_QFT_CACHE."""
    return Path(os.environ.get("DIST_QFT_CACHE", "~/.cache/dist_qft")).expanduser()


def _smollm2() -> PreTrainedModel:
    path = cache() / GGUF
    if not path.is_file():
        raise UserError(f"no file '{path}'; launch/get_smollm2.sh gets it")
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # transformers refuses to save what it thinks is still quantized.
    del loaded.config.quantization_config
    model = AutoModelForCausalLM.from_config(loaded.config)
    model.load_state_dict(loaded.state_dict())
    return model


def _random_model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = _LLAMAS.get(name) or _MIXTURES[name]
    config = (LlamaConfig if name in _LLAMAS else Qwen3MoeConfig)(**sizes, max_position_embeddings=2048)
    dtype = torch.float32 if name.startswith("tiny") else torch.bfloat16
    return AutoModelForCausalLM.from_config(config, dtype=dtype)
