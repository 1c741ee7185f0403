"""Mixtures whose files hold each expert by itself, quantized as other programs do, and the weights that they mean."""

from collections.abc import Callable
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3MoeConfig

from tests.support.packed_folders import compressed, gptq, save_int4_folder, set_quantization
from tests.support.tiny_model import VOCABULARY, save_tiny_model

MIXTURE = Qwen3MoeConfig(
    hidden_size=64,
    intermediate_size=64,
    moe_intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=4,
    num_experts_per_tok=2,
    vocab_size=VOCABULARY,
    tie_word_embeddings=False,
    decoder_sparse_step=1,
    mlp_only_layers=[],
)
EXPERTS = "model.layers.0.mlp.experts"
COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}
Meant = dict[str, Tensor]


def save_nvfp4(folder: Path) -> Meant:
    """compressed-tensors' NVFP4, every tensor with a scale of its own."""
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    generator = torch.Generator().manual_seed(2)

    def pack(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = weight.shape
        nibbles = torch.randint(0, 16, (rows, columns), generator=generator)
        scale = (torch.rand(rows, columns // 16, generator=generator) * 300 + 50).to(torch.float8_e4m3fn)
        whole = torch.rand(1, generator=generator) * 1e4 + 1e3
        parts = {"_packed": (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).byte(), "_scale": scale, "_global_scale": whole}
        signed = torch.where(nibbles >= 8, -values[nibbles & 7], values[nibbles & 7])
        meant = signed * (scale.float() / whole).repeat_interleave(16, 1)
        return {f"{module}.weight{suffix}": part for suffix, part in parts.items()}, meant

    return _save(folder, pack, COMPRESSED | {"format": "nvfp4-pack-quantized"})


def save_bitsandbytes(folder: Path) -> Meant:
    """Double-quantized nf4 by bitsandbytes itself."""

    def pack(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        codes, state = bnb.quantize_4bit(weight.float(), blocksize=32, compress_statistics=True, quant_type="nf4")
        name = f"{module}.weight"
        parts = {f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}
        return parts | {name: codes}, bnb.dequantize_4bit(codes, state)

    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return _save(folder, pack, settings | {"bnb_4bit_use_double_quant": True})


def _save(
    folder: Path, pack: Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]], settings: dict[str, object]
) -> Meant:
    save_tiny_model(folder, MIXTURE)
    tensors, meant = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        parts, meant[name] = pack(name.removesuffix(".weight"), tensors.pop(name))
        tensors |= parts
    save_file(tensors, folder / "model.safetensors")
    set_quantization(folder, settings)
    return meant


def save_one_small_scale(folder: Path) -> Meant:
    """Symmetric int4 with bfloat16 scales, all of them exact in float16 but one of one expert."""
    meant = save_int4_folder(
        folder, MIXTURE, compressed, COMPRESSED, group=16, symmetric=True, scale_dtype=torch.bfloat16
    )
    tensors, module = load_file(folder / "model.safetensors"), f"{EXPERTS}.3.up_proj"
    small = torch.tensor(1.1e-6).bfloat16()
    weight, scales = meant[f"{module}.weight"], tensors[f"{module}.weight_scale"]
    weight[0, :16] *= small.float() / scales[0, 0].float()
    scales[0, 0] = small
    save_file(tensors, folder / "model.safetensors")
    return meant


def save_act_order(folder: Path, exempt: tuple[str, ...] = ()) -> Meant:
    """GPTQ's act-order: the inputs of each expert have groups of their own."""
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True, "desc_act": True}
    return save_int4_folder(folder, MIXTURE, gptq, settings, group=16, symmetric=True, act_order=True, exempt=exempt)
