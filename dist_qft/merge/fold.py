"""Folding an adapter into a layer's own weight: dW by rows, the exact fold, and the inexact merges.

With w = scale * q + zero, a dW that is constant on every block only moves the zeros: zero' = zero + dW, codes and
scales stay as they are (QA-LoRA, arXiv 2309.14717; QA-HiRA, arXiv 2407.17029). All sums are made in float64 and
rounded once, to the zero's own float16: that rounding is the whole error. Here is arithmetic on one layer; which
rank holds which rows, and where results go, is `collective` and the writers.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dist_qft.errors import UserError
from dist_qft.methods.tile_adapter import TileAdapter
from dist_qft.quant.affine4 import Affine4
from dist_qft.quant.contract import Format, Shape, row_chunks
from dist_qft.quant.dense import Dense
from dist_qft.quant.frozen import FrozenLinear

_ROWS = 256  # tile rows multiplied at a time


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
        self.update_squares += float((exact - before.cpu().double()).square().sum())


@torch.no_grad()
def tile_rows(adapter: TileAdapter, start: int, stop: int) -> Tensor:
    """Rows start..stop of the tile values of dW: float64 (stop - start, d_in / p).

    Products are taken over blocks of rows at fixed places, so a row's bits do not depend on which others a rank holds.
    """
    scale = adapter.settings.tile_scale
    if adapter.B is None:
        return adapter.A[start:stop].double() * scale
    right = adapter.A.double()
    first = start // _ROWS * _ROWS
    blocks = [adapter.B[row : row + _ROWS].double() @ right for row in range(first, stop, _ROWS)]
    return torch.cat(blocks)[start - first : stop - first] * scale


def update_rows(adapter: TileAdapter, start: int, stop: int) -> Tensor:
    """Rows start..stop of dW: float64 (stop - start, d_in)."""
    repeat, pool = adapter.settings.repeat, adapter.settings.pool
    top = start // repeat
    tiles = tile_rows(adapter, top, -(-stop // repeat))
    return tiles.repeat_interleave(pool, 1).repeat_interleave(repeat, 0)[start - top * repeat : stop - top * repeat]


def folding_tensor(format: Format) -> tuple[str, tuple[int, int]] | None:
    """The packed tensor into which dW folds exactly, and the block that each of its elements stands for."""
    if isinstance(format, Affine4):
        return "zero", format.block
    return ("weight", (1, 1)) if isinstance(format, Dense) else None


def folded(part: Tensor, first: int, width: int, block: tuple[int, int], adapter: TileAdapter) -> tuple[Tensor, Tensor]:
    """A flat part of a tensor of block constants with the adapter's dW added.

    Args:
        part: elements first, first + 1, ... of the constants (rows, width) laid out flat.
        block: outputs and inputs that one constant stands for; lies inside one tile.

    Returns:
        The sum rounded once to the constants' dtype, and the exact sum in float64.
    """
    settings = adapter.settings
    top, bottom = first // width, -(-(first + part.numel()) // width)
    rows = torch.arange(top, bottom) * block[0] // settings.repeat
    columns = torch.arange(width) * block[1] // settings.pool
    tiles = tile_rows(adapter, int(rows[0]), int(rows[-1]) + 1).cpu()
    update = tiles[rows - rows[0]][:, columns].flatten()[first - top * width :][: part.numel()]
    exact = part.cpu().double() + update
    if part.dtype == torch.float16:
        # NumPy rounds float64 to float16 once; torch goes through float32 and rounds twice.
        with np.errstate(over="ignore"):
            return torch.from_numpy(exact.numpy().astype(np.float16)), exact
    return exact.to(part.dtype), exact


def merged_rows(
    format: Format, packed: Mapping[str, Tensor], shape: Shape, adapter: TileAdapter | None
) -> Iterator[Tensor]:
    """A packed weight, plus its adapter's dW if it has one: chunks of rows, float64, in order."""
    device = next(iter(packed.values())).device
    whole = None if format.row_local else format.dequantize(packed, shape, torch.float32)
    for rows in row_chunks(shape, device, format.row_alignment):
        if whole is None:
            chunk = format.slice_rows(packed, rows.start, rows.stop)
            weight = format.dequantize(chunk, (rows.stop - rows.start, shape[1]), torch.float32)
        else:
            weight = whole[rows]
        exact = weight.double()
        yield exact if adapter is None else exact + update_rows(adapter, rows.start, rows.stop).to(device)


def merged_weight(
    format: Format, packed: Mapping[str, Tensor], shape: Shape, adapter: TileAdapter | None, dtype: torch.dtype
) -> Tensor:
    """The whole of `merged_rows`, each value rounded to `dtype`."""
    return torch.cat([rows.to(dtype) for rows in merged_rows(format, packed, shape, adapter)])


def require_foldable(path: str, layer: FrozenLinear, adapter_repeat: int, adapter_pool: int) -> str | None:
    """Why dW does not fold exactly into this layer, with the nearest settings that would; None if it does."""
    found = folding_tensor(layer.format)
    if found is None:
        return f"{path} is {layer.format.name}, which has no zeros to take dW; quantization.linear: affine4 has"
    faults = []
    settings = (("repeat", adapter_repeat, layer.out_features), ("pool", adapter_pool, layer.in_features))
    for (knob, value, size), block in zip(settings, found[1], strict=True):
        if value % block:
            legal = [factor for factor in range(block, size + 1, block) if size % factor == 0]
            nearest = sorted(sorted(legal, key=lambda factor: abs(factor - value))[:2])
            faults.append(f"{knob} {value} is not a multiple of {block} (nearest legal: {_either(nearest)})")
    return f"blocks of {list(found[1])} cross the tiles of {path}: {'; '.join(faults)}" if faults else None


def require_finite(values: Tensor, where: str) -> None:
    """Refuse sums that left the range of the dtype they were rounded to."""
    if not torch.isfinite(values).all():
        raise UserError(f"{where}: zero + dW leaves the range of {values.dtype}; merge --to dense can hold it")


def _float16_step(values: Tensor) -> Tensor:
    """Distance from each float16 value to the next larger one in magnitude, float64."""
    exponent = torch.frexp(values.double()).exponent
    exponent[values == 0] = -13  # as for all subnormals
    return torch.ldexp(torch.ones_like(values, dtype=torch.float64), exponent.clamp_(min=-13) - 11)


def _either(values: list[int]) -> str:
    return " or ".join(map(str, values))
