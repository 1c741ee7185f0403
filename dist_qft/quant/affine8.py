"""`affine8`: w = scale * q + zero with a byte for each q, for weights of more than 4 bits that other programs wrote.

GGUF's Q5_1 and Q5_K have 5-bit codes and a minimum beside the scale; with a byte for a code and float32 constants they
are held value for value. The zero is in weight units, so a change that is constant on each block folds into it as into
`affine4`'s. Only read from files, never quantized into.
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
    FoldTarget,
    Format,
    PackedShapes,
    Shape,
    wider_constants,
    with_constants,
)


@dataclass(frozen=True)
class Affine8(BlockFormat):
    """`codes` uint8 (out, in); `scale` and `zero` (out, in / block) in the dtype `constants`.

    Codes times scales must be exact in float32, as they are for codes of 5 bits and scales of at most 19: the sum is
    then rounded once, on CPUs and GPUs alike.
    """

    block: int = 32
    constants: str = "float32"
    name: ClassVar[str] = "affine8"

    def __post_init__(self) -> None:
        if not isinstance(self.block, int) or self.block < 1 or self.constants not in CONSTANTS:
            raise UserError(
                f"affine8: got block {self.block} and constants {self.constants}, must be a size and a dtype"
            )

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "block": self.block, "constants": self.constants}

    def check(self, shape: Shape, where: str) -> None:
        if shape[1] % self.block:
            raise UserError(f"{where}: affine8 needs in_features to be a multiple of {self.block}, got {shape}")

    def packed_shapes(self, shape: Shape) -> PackedShapes:
        constants = (shape[0], shape[1] // self.block), CONSTANTS[self.constants]
        return {"codes": (shape, torch.uint8), "scale": constants, "zero": constants}

    def rows_per_entry(self, tensor_name: str) -> int:
        return 1

    def holds(self, stored: Format) -> bool:
        if not isinstance(stored, Affine8) or stored.block != self.block:
            return False
        return wider_constants(self.constants, stored.constants)

    def from_stored(self, packed: Mapping[str, Tensor], stored: Format, where: str) -> dict[str, Tensor]:
        return with_constants(packed, self.constants)

    def blocks(self, shape: Shape) -> int:
        return shape[0] * shape[1] // self.block

    @property
    def fold_target(self) -> FoldTarget:
        return FoldTarget("zero", (1, self.block))

    def quantize(self, weight: Tensor, where: str = "weight") -> dict[str, Tensor]:
        raise UserError(f"{where}: {self.name} is only read from files; quantize to q8_0, nf4 or affine4")

    def _quantize_rows(self, weight: Tensor, where: str) -> dict[str, Tensor]:
        raise NotImplementedError(f"{self.name} is only read")

    def _dequantize_rows(self, packed: Mapping[str, Tensor], out: Tensor) -> None:
        out.copy_(packed["codes"])
        blocks = out.unflatten(1, (-1, self.block))
        blocks.mul_(packed["scale"].float().unsqueeze(-1)).add_(packed["zero"].float().unsqueeze(-1))

    def _dequantize_on_cuda(self, packed: Mapping[str, Tensor], out: Tensor) -> None:
        from dist_qft.quant.triton_kernels import dequantize_affine8

        dequantize_affine8(packed, self.block, out)
