"""`affine4`: w = scale * q + zero, with 4-bit q and float16 or float32 constants per 2-D block.

The zero is in weight units and real-valued, so a change of the weight that is constant on each block folds into it
exactly (QA-LoRA, arXiv 2309.14717; QA-HiRA, arXiv 2407.17029). Block [1, 32] is bit for bit GGUF's Q4_1. This file
does no merging.

Integer formats of other programs are affine4 too: scale * (q - z) has zero = -scale * z. For z = 8 (symmetric int4)
that is a power of two times the scale and exact in float16; for any other z it takes up to 15 bits, and float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeGuard

import torch
from torch import Tensor

from dist_qft.divisors import either, nearest_divisors
from dist_qft.errors import UserError
from dist_qft.quant.contract import (
    CONSTANTS,
    BlockFormat,
    FoldTarget,
    Format,
    PackedShapes,
    Shape,
    float16_constants,
    inverse_scale,
    wider_constants,
)
from dist_qft.quant.nibbles import group_width, pack_nibbles, unpack_into

GGUF_BLOCK = 32
_GGUF_BLOCK_BYTES = 2 + 2 + GGUF_BLOCK // 2  # scale, zero, codes
_LARGEST_CODE = 15
# A float32 scale keeps 20 bits of its 24: with a 4-bit code the product is then exact, whether or not a compiler fuses
# it with the sum, so CPU and GPU give the same bits.
_SCALE_MASK = -(1 << 4)


@dataclass(frozen=True)
class Affine4(BlockFormat):
    """Min-max quantization in blocks of b_out outputs by b_in inputs, with the arithmetic of GGUF's Q4_1.

    `codes` uint8 (out, in / 2); `scale` and `zero` (out / b_out, in / b_in) in the dtype `constants`. Codes are packed
    in groups of consecutive inputs as `nibbles` says; the packing does not depend on the block.

    One bit pattern differs from GGUF's: a minimum of -0.0 is stored as +0.0, since the order in which a reduction meets
    zeros of both signs is not defined.
    """

    block: tuple[int, int] = (1, GGUF_BLOCK)
    constants: str = "float16"
    name: ClassVar[str] = "affine4"

    def __post_init__(self) -> None:
        if min(self.block) < 1:
            raise UserError(f"quantization.block: got {list(self.block)}, must be two sizes of at least 1 for affine4")
        if self.constants not in CONSTANTS:
            raise UserError(f"quantization.constants: got '{self.constants}', must be one of {', '.join(CONSTANTS)}")

    @property
    def row_alignment(self) -> int:
        return self.block[0]

    def describe(self) -> dict[str, Any]:
        settings = {"name": self.name, "block": list(self.block)}
        # Unsaid for float16, so that fingerprints from before there was a choice still hold.
        return settings if self.constants == "float16" else settings | {"constants": self.constants}

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
            "scale": (constants, CONSTANTS[self.constants]),
            "zero": (constants, CONSTANTS[self.constants]),
        }

    def rows_per_entry(self, tensor_name: str) -> int:
        return 1 if tensor_name == "codes" else self.block[0]

    def blocks(self, shape: Shape) -> int:
        return shape[0] // self.block[0] * (shape[1] // self.block[1])

    @property
    def fold_target(self) -> FoldTarget:
        return FoldTarget("zero", self.block)

    def holds(self, stored: Format) -> bool:
        return self.keeps_codes_of(stored) and wider_constants(self.constants, stored.constants)

    def keeps_codes_of(self, stored: Format) -> TypeGuard["Affine4"]:
        return isinstance(stored, Affine4) and stored.block == self.block

    def from_stored(self, packed: Mapping[str, Tensor], stored: Format, where: str) -> dict[str, Tensor]:
        constants = {name: self._constants(packed[name].float(), where) for name in ("scale", "zero")}
        return {"codes": packed["codes"], **constants}

    def rounding_in_steps(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
        scale = before["scale"].double()
        moved = [(after[name].double() - before[name].double()).abs() for name in ("scale", "zero")]
        return float(((_LARGEST_CODE * moved[0] + moved[1]) / scale.abs()).nan_to_num(0.0).max())

    def _quantize_rows(self, weight: Tensor, where: str) -> dict[str, Tensor]:
        b_out, b_in = self.block
        blocks = weight.unflatten(1, (-1, b_in)).unflatten(0, (-1, b_out))
        low = blocks.amin((1, 3), keepdim=True) + 0.0
        scale = (blocks.amax((1, 3), keepdim=True) - low) / _LARGEST_CODE
        if self.constants == "float32":
            scale = rounded_scale(scale)
        codes = ((blocks - low) * inverse_scale(scale) + 0.5).clamp_(0, _LARGEST_CODE).to(torch.uint8)
        return {
            "codes": pack_nibbles(codes.view(weight.shape)),
            "scale": self._constants(scale, where).squeeze((1, 3)),
            "zero": self._constants(low, where).squeeze((1, 3)),
        }

    def _dequantize_rows(self, packed: Mapping[str, Tensor], out: Tensor) -> None:
        in_features = out.shape[1]
        b_out, b_in = self.block
        unpack_into(packed["codes"], out)
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

        dequantize_affine4(packed, self.block, group_width(out.shape[1]), out)

    def _constants(self, constants: Tensor, where: str) -> Tensor:
        return float16_constants(constants, where) if self.constants == "float16" else constants


def rounded_scale(scale: Tensor) -> Tensor:
    """float32 scales cut to 20 significant bits; see `_SCALE_MASK`."""
    return (scale.contiguous().view(torch.int32) & _SCALE_MASK).view(torch.float32)


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
