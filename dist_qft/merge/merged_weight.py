"""Adding an adapter to a layer's own weight: dW by rows, the inexact merges, and how far results are from exact sums.

The exact fold itself is `dist_qft.methods.folding`. Here is arithmetic on one layer; which rank holds which rows, and
where results go, is `collective` and the writers.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_qft.errors import UserError
from dist_qft.methods.folding import tile_rows
from dist_qft.methods.tile_adapter import TileAdapter
from dist_qft.quant.contract import Format, Shape, row_chunks


@dataclass
class Difference:
    """Distance between weights as written and as they should be.

    Only exact folds count `steps`, the largest distance in units of the float16 step at the value written, and the
    sums of squares of the distances and of dW itself.
    """

    maximum: float = 0.0
    total: float = 0.0
    count: int = 0
    steps: float = 0.0
    squares: float = 0.0
    update_squares: float = 0.0

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0

    @property
    def share_of_update(self) -> float:
        """Root mean square of the distances over that of dW: how much of what was learned the rounding takes."""
        return math.sqrt(self.squares / self.update_squares) if self.update_squares else 0.0

    def __add__(self, other: "Difference") -> "Difference":
        return Difference(
            max(self.maximum, other.maximum),
            self.total + other.total,
            self.count + other.count,
            max(self.steps, other.steps),
            self.squares + other.squares,
            self.update_squares + other.update_squares,
        )

    def add(self, written: Tensor, exact: Tensor) -> None:
        """Count values as written against exact ones, of the same shape."""
        if written.numel() == 0:
            return
        distance = (written.double() - exact.double()).abs()
        self.maximum = max(self.maximum, float(distance.max()))
        self.total += float(distance.sum())
        self.count += distance.numel()

    def add_fold(self, before: Tensor, written: Tensor, exact: Tensor) -> None:
        """Count constants into which dW was folded."""
        if written.numel() == 0:
            return
        self.add(written, exact)
        distance = (written.double() - exact).abs()
        if written.dtype == torch.float16:
            self.steps = max(self.steps, float((distance / _float16_step(written)).max()))
        self.squares += float(distance.square().sum())
        self.update_squares += float((exact - before.double()).square().sum())


def update_rows(adapter: TileAdapter, start: int, stop: int) -> Tensor:
    """Rows start..stop of dW: float64 (stop - start, d_in)."""
    repeat, pool = adapter.settings.repeat, adapter.settings.pool
    top = start // repeat
    tiles = tile_rows(adapter, top, -(-stop // repeat))
    return tiles.repeat_interleave(pool, 1).repeat_interleave(repeat, 0)[start - top * repeat : stop - top * repeat]


def merged_rows(
    format: Format, packed: Mapping[str, Tensor], shape: Shape, adapter: TileAdapter | None
) -> Iterator[Tensor]:
    """A packed weight, plus its adapter's dW if it has one: chunks of rows, float64, in order."""
    if format.row_local:
        pieces = format.row_pieces(packed, shape, torch.float32)
    else:
        whole = format.dequantize(packed, shape, torch.float32)
        pieces = ((rows, whole[rows]) for rows in row_chunks(shape, whole.device, format.row_alignment))
    for rows, weight in pieces:
        exact = weight.double()
        yield exact if adapter is None else exact + update_rows(adapter, rows.start, rows.stop).to(exact.device)


def merged_weight(
    format: Format, packed: Mapping[str, Tensor], shape: Shape, adapter: TileAdapter | None, dtype: torch.dtype
) -> Tensor:
    """The whole of `merged_rows`, each value rounded to `dtype`."""
    return torch.cat([rows.to(dtype) for rows in merged_rows(format, packed, shape, adapter)])


def require_finite(values: Tensor, where: str) -> None:
    """Refuse sums that left the range of the dtype they were rounded to."""
    if not torch.isfinite(values).all():
        raise UserError(f"{where}: zero + dW leaves the range of {values.dtype}; merge --to dense can hold it")


def _float16_step(values: Tensor) -> Tensor:
    """Distance from each float16 value to the next larger one in magnitude, float64."""
    exponent = torch.frexp(values.double()).exponent
    exponent[values == 0] = -13  # as for all subnormals
    return torch.ldexp(torch.ones_like(values, dtype=torch.float64), exponent.clamp_(min=-13) - 11)
