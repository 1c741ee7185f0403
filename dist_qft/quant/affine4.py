"""`affine4`: w = scale * q + zero, with 4-bit q and float16 constants per 2-D block.

The zero is in weight units and real-valued, so a change of the weight that is constant on each block folds into it
exactly (QA-LoRA, arXiv 2309.14717; QA-HiRA, arXiv 2407.17029). Block [1, 32] is bit for bit GGUF's Q4_1. This file
does no merging.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dist_qft.divisors import either, nearest_divisors
from dist_qft.errors import UserError
from dist_qft.quant.contract import (
    BlockFormat,
    PackedShapes,
    Shape,
    float16_constants,
    inverse_scale,
)

GGUF_BLOCK = 32
_GGUF_BLOCK_BYTES = 2 + 2 + GGUF_BLOCK // 2  # scale, zero, codes
_LOW_NIBBLES = 0x0F0F0F0F0F0F0F0F


@dataclass(frozen=True)
class Affine4(BlockFormat):
    """Min-max quantization in blocks of b_out outputs by b_in inputs, with the arithmetic of GGUF's Q4_1.

    `codes` uint8 (out, in / 2); `scale` and `zero` float16 (out / b_out, in / b_in). Codes are packed in groups of g
    consecutive inputs, g the largest power of two up to 32 that divides in_features: the low nibbles hold the first
    g / 2 of a group, the high nibbles the rest. The packing does not depend on the block.

    One bit pattern differs from GGUF's: a minimum of -0.0 is stored as +0.0, since the order in which a reduction meets
    zeros of both signs is not defined.
    """

    block: tuple[int, int] = (1, GGUF_BLOCK)
    name: ClassVar[str] = "affine4"

    def __post_init__(self) -> None:
        if min(self.block) < 1:
            raise UserError(f"quantization.block: got {list(self.block)}, affine4 needs two sizes of at least 1")

    @property
    def row_alignment(self) -> int:
        return self.block[0]

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "block": list(self.block)}

    def check(self, shape: Shape, where: str) -> None:
        faults = []
        for side, size, block in zip(("out_features", "in_features"), shape, self.block, strict=True):
            if size % block:
                nearest = either(nearest_divisors(size, block))
                faults.append(f"{block} does not divide {side} {size} (nearest: {nearest})")
        if shape[1] % 2:
            faults.append(f"in_features {shape[1]} is odd, two codes share a byte")
        if faults:
            raise UserError(
                f"{where}: affine4 block {list(self.block)} cannot hold a weight of shape {shape}: {'; '.join(faults)}"
            )

    def packed_shapes(self, shape: Shape) -> PackedShapes:
        out_features, in_features = shape
        constants = (out_features // self.block[0], in_features // self.block[1])
        return {
            "codes": ((out_features, in_features // 2), torch.uint8),
            "scale": (constants, torch.float16),
            "zero": (constants, torch.float16),
        }

    def rows_per_entry(self, tensor_name: str) -> int:
        return 1 if tensor_name == "codes" else self.block[0]

    def _quantize_rows(self, weight: Tensor, where: str) -> dict[str, Tensor]:
        b_out, b_in = self.block
        blocks = weight.unflatten(1, (-1, b_in)).unflatten(0, (-1, b_out))
        low = blocks.amin((1, 3), keepdim=True) + 0.0
        scale = (blocks.amax((1, 3), keepdim=True) - low) / 15
        codes = ((blocks - low) * inverse_scale(scale) + 0.5).clamp_(0, 15).to(torch.uint8)
        halves = codes.view(weight.shape).unflatten(1, (-1, 2, _group(weight.shape[1]) // 2))
        return {
            "codes": (halves[:, :, 0] | (halves[:, :, 1] << 4)).flatten(1),
            "scale": float16_constants(scale, where).squeeze((1, 3)),
            "zero": float16_constants(low, where).squeeze((1, 3)),
        }

    def _dequantize_rows(self, packed: Mapping[str, Tensor], out: Tensor) -> None:
        in_features = out.shape[1]
        b_out, b_in = self.block
        half = _group(in_features) // 2
        codes = packed["codes"].unflatten(1, (-1, half))
        halves = out.unflatten(1, (-1, 2, half))
        if half % 8 == 0 and packed["codes"].storage_offset() % 8 == 0 and packed["codes"].is_contiguous():
            # Eight bytes at a time: the same codes in less time than byte by byte into two strided halves.
            words = codes.view(torch.int64)
            nibbles = torch.stack([words & _LOW_NIBBLES, (words >> 4) & _LOW_NIBBLES], dim=2)
            halves.copy_(nibbles.view(torch.uint8))
        else:
            halves[:, :, 0].copy_(codes & 0x0F)
            halves[:, :, 1].copy_(codes >> 4)
        scale = packed["scale"].float().unsqueeze(-1)
        zero = packed["zero"].float().unsqueeze(-1)
        if b_out == 1:
            blocks = out.unflatten(1, (-1, b_in))
        else:
            # Constants spread over the inputs (1 / b_out of the weight) make every inner loop a whole row; loops over
            # the few inputs of a 2-D block take twice the time.
            blocks = out.unflatten(0, (-1, b_out))
            scale = scale.expand(-1, -1, b_in).reshape(-1, 1, in_features)
            zero = zero.expand(-1, -1, b_in).reshape(-1, 1, in_features)
        blocks.mul_(scale).add_(zero)

    def _dequantize_on_cuda(self, packed: Mapping[str, Tensor], out: Tensor) -> None:
        from dist_qft.quant.triton_kernels import dequantize_affine4

        dequantize_affine4(packed, self.block, _group(out.shape[1]), out)


def affine4_from_q4_1(raw: Tensor) -> dict[str, Tensor]:
    """The packed tensors of a GGUF Q4_1 weight, for block [1, 32]; `raw` is uint8 (out, in / 32 * 20)."""
    blocks = raw.unflatten(1, (-1, _GGUF_BLOCK_BYTES))
    constants = blocks[:, :, :4].contiguous().view(torch.float16)
    return {
        "codes": blocks[:, :, 4:].flatten(1),
        "scale": constants[:, :, 0].contiguous(),
        "zero": constants[:, :, 1].contiguous(),
    }


def q4_1_from_affine4(packed: Mapping[str, Tensor], shape: Shape) -> Tensor:
    """Inverse of `affine4_from_q4_1`: uint8 (out, in / 32 * 20). Raises UserError for any block but [1, 32]."""
    rows, in_features = shape
    if in_features % GGUF_BLOCK or tuple(packed["scale"].shape) != (rows, in_features // GGUF_BLOCK):
        raise UserError(
            f"GGUF Q4_1 holds affine4 with block [1, {GGUF_BLOCK}] only, "
            f"got {tuple(packed['scale'].shape)} blocks for a weight of shape {shape}"
        )
    constants = torch.stack([packed["scale"], packed["zero"]], dim=-1).view(torch.uint8)
    codes = packed["codes"].unflatten(1, (-1, GGUF_BLOCK // 2))
    return torch.cat([constants, codes], dim=-1).flatten(1)


def _group(in_features: int) -> int:
    """Inputs packed together: the largest power of two up to 32 that divides in_features."""
    return min(GGUF_BLOCK, in_features & -in_features)
