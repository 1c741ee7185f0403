"""`q8_0`: 8-bit codes with one float16 scale per 32 inputs, bit for bit GGUF's Q8_0.

For embeddings and LM heads, which otherwise dominate a 4-bit model's memory: 1.06 bytes per weight.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dist_qft.errors import UserError
from dist_qft.quant.contract import BlockFormat, PackedShapes, Shape, float16_constants, inverse_scale

GGUF_BLOCK = 32
_GGUF_BLOCK_BYTES = 2 + GGUF_BLOCK  # scale, codes


@dataclass(frozen=True)
class Q8_0(BlockFormat):
    """w = scale * q with q in -127..127: `codes` int8 (out, in), `scale` float16 (out, in / block).

    Holds every shape: where 32 does not divide in_features, its largest divisor below 32 is the block.
    """

    name: ClassVar[str] = "q8_0"

    def describe(self) -> dict[str, Any]:
        return {"name": self.name}

    def check(self, shape: Shape, where: str) -> None:
        pass

    def packed_shapes(self, shape: Shape) -> PackedShapes:
        out_features, in_features = shape
        return {
            "codes": (shape, torch.int8),
            "scale": ((out_features, in_features // _block(in_features)), torch.float16),
        }

    def rows_per_entry(self, tensor_name: str) -> int:
        return 1

    def _quantize_rows(self, weight: Tensor, where: str) -> dict[str, Tensor]:
        blocks = weight.unflatten(1, (-1, _block(weight.shape[1])))
        scale = blocks.abs().amax(-1, keepdim=True) / 127
        scaled = blocks * inverse_scale(scale)
        # GGUF rounds halves away from zero, torch.round to even.
        magnitude = scaled.abs()
        whole = magnitude.floor()
        whole += (2 * (magnitude - whole)).floor()
        codes = whole.copysign_(scaled).to(torch.int8)
        return {"codes": codes.flatten(1), "scale": float16_constants(scale, where).squeeze(-1)}

    def _dequantize_rows(self, packed: Mapping[str, Tensor], out: Tensor) -> None:
        out.copy_(packed["codes"])
        out.unflatten(1, (-1, _block(out.shape[1]))).mul_(packed["scale"].float().unsqueeze(-1))

    def _dequantize_on_cuda(self, packed: Mapping[str, Tensor], out: Tensor) -> None:
        from dist_qft.quant.triton_kernels import dequantize_q8_0

        dequantize_q8_0(packed, _block(out.shape[1]), out)


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


def _block(in_features: int) -> int:
    return next(block for block in range(GGUF_BLOCK, 0, -1) if in_features % block == 0)
