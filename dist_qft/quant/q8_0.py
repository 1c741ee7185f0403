"""`q8_0`: 8-bit codes with one scale per 32 inputs, bit for bit GGUF's Q8_0.

For embeddings and LM heads, which otherwise dominate a 4-bit model's memory: 1.06 bytes per weight. With other blocks
and float32 scales it also holds, value for value, the GGUF types whose weights are a scale times a small integer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dist_qft.errors import UserError
from dist_qft.quant.contract import (
    CONSTANTS,
    BlockFormat,
    Format,
    PackedShapes,
    Shape,
    float16_constants,
    inverse_scale,
    wider_constants,
    with_constants,
)

GGUF_BLOCK = 32
_GGUF_BLOCK_BYTES = 2 + GGUF_BLOCK  # scale, codes


@dataclass(frozen=True)
class Q8_0(BlockFormat):
    """w = scale * q: `codes` int8 (out, in), `scale` (out, in / block) in the dtype `constants`.

    Quantizing gives codes in -127..127. Holds every shape: where `block` does not divide in_features, its largest
    divisor below `block` is the block.
    """

    block: int = GGUF_BLOCK
    constants: str = "float16"
    name: ClassVar[str] = "q8_0"

    def describe(self) -> dict[str, Any]:
        # The defaults are unsaid, so that fingerprints from before there was a choice still hold.
        settings = {"block": (self.block, GGUF_BLOCK), "constants": (self.constants, "float16")}
        return {"name": self.name} | {key: value for key, (value, default) in settings.items() if value != default}

    def check(self, shape: Shape, where: str) -> None:
        pass

    def packed_shapes(self, shape: Shape) -> PackedShapes:
        out_features, in_features = shape
        return {
            "codes": (shape, torch.int8),
            "scale": ((out_features, in_features // self.block_in(in_features)), CONSTANTS[self.constants]),
        }

    def rows_per_entry(self, tensor_name: str) -> int:
        return 1

    def holds(self, stored: Format) -> bool:
        if not isinstance(stored, Q8_0) or stored.block != self.block:
            return False
        return wider_constants(self.constants, stored.constants)

    def from_stored(self, packed: Mapping[str, Tensor], stored: Format, where: str) -> dict[str, Tensor]:
        return with_constants(packed, self.constants)

    def block_in(self, in_features: int) -> int:
        """The block in a row of so many inputs."""
        return next(block for block in range(self.block, 0, -1) if in_features % block == 0)

    def blocks(self, shape: Shape) -> int:
        return shape[0] * shape[1] // self.block_in(shape[1])

    @property
    def fold_obstacle(self) -> str:
        return "which has scales alone and no zeros to take dW"

    def _quantize_rows(self, weight: Tensor, where: str) -> dict[str, Tensor]:
        blocks = weight.unflatten(1, (-1, self.block_in(weight.shape[1])))
        scale = blocks.abs().amax(-1, keepdim=True) / 127
        scaled = blocks * inverse_scale(scale)
        # GGUF rounds halves away from zero, torch.round to even.
        magnitude = scaled.abs()
        whole = magnitude.floor()
        whole += (2 * (magnitude - whole)).floor()
        codes = whole.copysign_(scaled).to(torch.int8)
        return {"codes": codes.flatten(1), "scale": self._constants(scale, where).squeeze(-1)}

    def _dequantize_rows(self, packed: Mapping[str, Tensor], out: Tensor) -> None:
        out.copy_(packed["codes"])
        out.unflatten(1, (-1, self.block_in(out.shape[1]))).mul_(packed["scale"].float().unsqueeze(-1))

    def _dequantize_on_cuda(self, packed: Mapping[str, Tensor], out: Tensor) -> None:
        from dist_qft.quant.triton_kernels import dequantize_q8_0

        dequantize_q8_0(packed, self.block_in(out.shape[1]), out)

    def _constants(self, scale: Tensor, where: str) -> Tensor:
        return float16_constants(scale, where) if self.constants == "float16" else scale


def q8_0_from_gguf(raw: Tensor) -> dict[str, Tensor]:
    """The packed tensors of a GGUF Q8_0 weight, value for value; `raw` is uint8 (out, in / 32 * 34)."""
    blocks = raw.unflatten(1, (-1, _GGUF_BLOCK_BYTES))
    return {
        "codes": blocks[:, :, 2:].flatten(1).view(torch.int8),
        "scale": blocks[:, :, :2].contiguous().view(torch.float16).squeeze(-1),
    }


def gguf_from_q8_0(packed: Mapping[str, Tensor], shape: Shape) -> Tensor:
    """Inverse of `q8_0_from_gguf`: uint8 (out, in / 32 * 34). Raises UserError if 32 does not divide in_features."""
    if shape[1] % GGUF_BLOCK:
        raise UserError(f"GGUF Q8_0 needs in_features to be a multiple of {GGUF_BLOCK}, got a weight of shape {shape}")
    scale = packed["scale"].contiguous().view(torch.uint8).unflatten(1, (-1, 2))
    codes = packed["codes"].contiguous().view(torch.uint8).unflatten(1, (-1, GGUF_BLOCK))
    return torch.cat([scale, codes], dim=-1).flatten(1)
