"""`dense`: a frozen weight kept as it is, in the model's compute dtype."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dist_qft.quant.contract import FoldTarget, Format, PackedShapes, Shape, finite_rows, row_chunks


@dataclass(frozen=True)
class Dense(Format):
    """One tensor, `weight` (out_features, in_features). Holds every shape."""

    name: ClassVar[str] = "dense"

    def describe(self) -> dict[str, Any]:
        return {"name": self.name}

    def check(self, shape: Shape, where: str) -> None:
        pass

    def packed_shapes(self, shape: Shape) -> PackedShapes:
        return {"weight": (shape, None)}

    def rows_per_entry(self, tensor_name: str) -> int:
        return 1

    @property
    def fold_target(self) -> FoldTarget:
        return FoldTarget("weight", (1, 1))

    def quantize(self, weight: Tensor, where: str = "weight") -> dict[str, Tensor]:
        """The weight itself, uncopied and in its own dtype, once its values are known to be finite."""
        for rows in row_chunks((weight.shape[0], weight.shape[1]), weight.device):
            finite_rows(weight, rows, where)
        return {"weight": weight}

    def dequantize(
        self, packed: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        """The stored tensor itself, not a copy, if it has this dtype and there is no `out`."""
        weight = packed["weight"]
        return weight.to(dtype) if out is None else out.copy_(weight)
