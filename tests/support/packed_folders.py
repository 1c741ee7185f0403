"""Folders as other programs quantize them: packers of their layouts, written here from their descriptions.

Each packer was compared by hand with the library that owns the layout (docs/formats-of-bases.md says which version),
so that the tests need none of them.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig

from tests.support.tiny_model import save_tiny_model

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Packer = Callable[[Tensor, Tensor, Tensor, Tensor], dict[str, Tensor]]


def words(numbers: Tensor) -> Tensor:
    """int32 (n, m / 8) of numbers 0..15 (n, m), the first in the lowest bits; m is padded with zeros."""
    padded = torch.nn.functional.pad(numbers.long(), (0, -numbers.shape[1] % 8))
    shifted = padded.unflatten(1, (-1, 8)) << torch.arange(0, 32, 4)
    total = shifted.sum(-1)
    return torch.where(total >= 1 << 31, total - (1 << 32), total).to(torch.int32)


def gptq(codes: Tensor, zeros: Tensor, scales: Tensor, group: Tensor, less: int = 1) -> dict[str, Tensor]:
    """Codes (out, in), zeros and scales (out, groups), the group of each input; `less` is taken off the zeros."""
    stored = words(zeros.t()).long() - less * 0x11111111
    stored = torch.where(stored < -(1 << 31), stored + (1 << 32), stored)
    return {
        "qweight": words(codes).t().contiguous(),
        "qzeros": stored.to(torch.int32),
        "scales": scales.t().contiguous(),
        "g_idx": group.to(torch.int32),
    }


def awq(codes: Tensor, zeros: Tensor, scales: Tensor, group: Tensor) -> dict[str, Tensor]:
    def in_order(numbers: Tensor) -> Tensor:
        return words(numbers.t().unflatten(1, (-1, 8))[:, :, list(AWQ_ORDER)].flatten(1))

    return {"qweight": in_order(codes), "qzeros": in_order(zeros), "scales": scales.t().contiguous()}


def compressed(codes: Tensor, zeros: Tensor, scales: Tensor, group: Tensor) -> dict[str, Tensor]:
    parts = {
        "weight_packed": words(codes),
        "weight_scale": scales,
        "weight_shape": torch.tensor(codes.shape),
    }
    if not (zeros == 8).all():
        parts["weight_zero_point"] = words(zeros.t()).t().contiguous()
    if not torch.equal(group, group.sort().values):
        parts["weight_g_idx"] = group.to(torch.int32)
    return parts


def save_int4_folder(
    folder: Path,
    config: PretrainedConfig,
    pack: Packer,
    settings: Mapping[str, Any],
    *,
    group: int,
    symmetric: bool,
    act_order: bool = False,
    scale_dtype: torch.dtype = torch.float16,
    exempt: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """A small model with random int4 linear layers; returns the weights it means, by name, in float32.

    The tensors of a module called in `exempt`, embeddings, norms and biases stay floats.
    """
    save_tiny_model(folder, config)
    generator = torch.Generator().manual_seed(5)
    tensors, meant = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_proj.weight") and name.split(".")[-2] not in exempt]:
        rows, columns = tensors.pop(name).shape
        size = columns if group == -1 else group
        groups = -(-columns // size)
        of_input = torch.arange(columns) // size
        if act_order:
            of_input = of_input[torch.randperm(columns, generator=generator)]
        codes = torch.randint(0, 16, (rows, columns), generator=generator)
        zeros = torch.randint(1, 15, (rows, groups), generator=generator)
        zeros = torch.full_like(zeros, 8) if symmetric else zeros
        scales = (torch.rand(rows, groups, generator=generator) * 0.02 + 0.005).to(scale_dtype)
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{part}": tensor for part, tensor in pack(codes, zeros, scales, of_input).items()}
        kept = (scales.float().view(torch.int32) & -16).view(torch.float32)  # 20 bits of a float32 scale
        meant[name] = kept[:, of_input] * (codes - zeros[:, of_input]).float()
    save_file(tensors, folder / "model.safetensors")
    set_quantization(folder, settings)
    return meant


def set_quantization(folder: Path, settings: Mapping[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": dict(settings)}))


def float_twin(folder: Path, target: Path, meant: Mapping[str, Tensor], drop: tuple[str, ...]) -> Path:
    """The folder of the same model as floats: `meant` in place of the parts whose names end in `drop`."""
    shutil.copytree(folder, target)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(drop)}
    save_file(kept | {name: tensor.contiguous() for name, tensor in meant.items()}, target / "model.safetensors")
    tree = json.loads((folder / "config.json").read_text())
    del tree["quantization_config"]
    (target / "config.json").write_text(json.dumps(tree))
    return target
