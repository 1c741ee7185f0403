"""Folders that the library compressed-tensors writes, and the weights that its own decompression makes of them."""

import json
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from tests.support.tiny_model import save_tiny_model

EXEMPT = ("lm_head", "re:.*o_proj")
_PARTS = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_global_scale")


def save_compressed(folder: Path, config: PretrainedConfig, weights: QuantizationArgs) -> dict[str, Tensor]:
    """A small bfloat16 model with biases, its linear layers but `EXEMPT` rounded to the nearest code by the library.

    Returns the weights, float32, that the library's decompression makes of the folder's tensors. Scales are float32
    while it computes: in bfloat16 it would round each weight a second time.
    """
    save_tiny_model(folder, config)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    apply_quantization_config(model, QuantizationConfig(config_groups={"all": scheme}, ignore=list(EXEMPT)))
    modules = {name: module for name, module in model.named_modules() if hasattr(module, "quantization_scheme")}
    for module in modules.values():
        _find_scales(module, weights)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    compressor.remove_decompression_hook(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    decompressor = BaseCompressor.get_value_from_registry(settings["format"])
    tensors, meant = load_file(folder / "model.safetensors"), {}
    for name in modules:
        parts = {part: tensors[f"{name}.{part}"] for part in _PARTS if f"{name}.{part}" in tensors}
        parts = {key: part.float() if part.dtype == torch.bfloat16 else part for key, part in parts.items()}
        if "weight_global_scale" in parts:  # its decompressor of NVFP4 computes in bfloat16 whatever the scales are
            meant[f"{name}.weight"] = _nvfp4(parts, weights)
        else:
            meant[f"{name}.weight"] = decompressor.decompress(parts, scheme)["weight"].float()
    return meant


def _nvfp4(parts: dict[str, Tensor], weights: QuantizationArgs) -> Tensor:
    """The steps of the library's decompressor in float32."""
    rows, half = parts["weight_packed"].shape
    values = unpack_fp4_from_uint8(parts["weight_packed"], rows, 2 * half, torch.float32)
    scale, whole = parts["weight_scale"].float(), parts["weight_global_scale"]
    return dequantize(values, scale=scale, args=weights, global_scale=whole, dtype=torch.float32)


def _find_scales(module: nn.Module, weights: QuantizationArgs) -> None:
    """Fill the scales and zeros that the library has made for a layer, from the extremes of what they cover."""
    weight = module.weight.detach()
    rows, columns = weight.shape
    strategy = weights.strategy
    if strategy == "tensor":
        extremes = weight.aminmax()
    elif strategy == "channel":
        extremes = weight.aminmax(dim=1, keepdim=True)
    elif strategy == "block":
        height, width = weights.block_structure
        padded = nn.functional.pad(weight, (0, -columns % width, 0, -rows % height))
        blocks = padded.unflatten(0, (-1, height)).unflatten(2, (-1, width))
        extremes = blocks.amin((1, 3)), blocks.amax((1, 3))
    else:
        extremes = weight.unflatten(1, (-1, weights.group_size)).aminmax(dim=2)
    whole = None
    if strategy == "tensor_group":
        whole = generate_gparam(weight.min(), weight.max())
        module.weight_global_scale.data.copy_(whole)
    scale, zero = calculate_qparams(*extremes, weights, global_scale=whole)
    module.weight_scale.data = scale
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.data = zero
