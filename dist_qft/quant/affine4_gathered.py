"""`affine4_gathered`: affine4 whose groups are not neighbours, as GPTQ with `desc_act` (act-order) makes them.

GPTQ with act-order sorts a layer's inputs by importance, forms its groups in that order, and stores the weight in the
old order with the group of each input beside it. The codes stay where they are here too, and constants are gathered.
No tile of neighbouring inputs lies within a group, so no adapter folds exactly.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dist_qft.errors import UserError
from dist_qft.quant.contract import CONSTANTS, BlockFormat, Format, PackedShapes, Shape
from dist_qft.quant.nibbles import group_width, unpack_into


@dataclass(frozen=True)
class Affine4Gathered(BlockFormat):
    """w[o, i] = scale[o, group[i]] * q[o, i] + zero[o, group[i]], with 4-bit q.

    `codes` uint8 (out, in / 2), packed as `nibbles` says; `scale` and `zero` (out, groups) in the dtype `constants`;
    `group` int32 (in,), which all rows share. Only read from files: there is no way to quantize into it.
    """

    groups: int
    constants: str = "float16"
    name: ClassVar[str] = "affine4_gathered"

    def __post_init__(self) -> None:
        if self.groups < 1 or self.constants not in CONSTANTS:
            raise UserError(f"affine4_gathered: got {self.groups} groups with {self.constants} constants")

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "groups": self.groups, "constants": self.constants}

    @property
    def words(self) -> str:
        return f"{self.name} {self.groups} groups, {self.constants} constants"

    def check(self, shape: Shape, where: str) -> None:
        if shape[1] % 2 or shape[1] < self.groups:
            raise UserError(
                f"{where}: {self.groups} gathered groups of 4-bit codes cannot hold a weight of shape {shape}"
            )

    def packed_shapes(self, shape: Shape) -> PackedShapes:
        out_features, in_features = shape
        constants = (out_features, self.groups)
        return {
            "codes": ((out_features, in_features // 2), torch.uint8),
            "scale": (constants, CONSTANTS[self.constants]),
            "zero": (constants, CONSTANTS[self.constants]),
            "group": ((in_features,), torch.int32),
        }

    def rows_per_entry(self, tensor_name: str) -> int | None:
        return None if tensor_name == "group" else 1

    def shared(self, tensor_name: str) -> bool:
        return tensor_name == "group"

    @property
    def in_stacks(self) -> Format | None:
        return None

    def blocks(self, shape: Shape) -> int:
        return shape[0] * self.groups

    @property
    def fold_obstacle(self) -> str:
        return "whose groups are not neighbouring inputs (act-order), so no tile lies within one"

    def quantize(self, weight: Tensor, where: str = "weight") -> dict[str, Tensor]:
        raise UserError(f"{where}: {self.name} is only read from files; quantize to affine4")

    def _quantize_rows(self, weight: Tensor, where: str) -> dict[str, Tensor]:
        raise NotImplementedError(f"{self.name} is only read")

    def _dequantize_rows(self, packed: Mapping[str, Tensor], out: Tensor) -> None:
        unpack_into(packed["codes"], out)
        group = packed["group"]
        out.mul_(packed["scale"].float().index_select(1, group)).add_(packed["zero"].float().index_select(1, group))

    def _dequantize_on_cuda(self, packed: Mapping[str, Tensor], out: Tensor) -> None:
        from dist_qft.quant.triton_kernels import dequantize_affine4_gathered

        dequantize_affine4_gathered(packed, group_width(out.shape[1]), out)
