"""Pooling and repeating neighbouring features, the two ends of a tile adapter, and each the other's gradient.

torch reduces and broadcasts over a short last dimension one number at a time on a CPU. There groups of 2, 4 or 8 are
summed by halves and added to in strides instead: 2 to 9 times faster (docs/performance.md).
"""

from typing import Any

import torch
from torch import Tensor


def sum_neighbours(x: Tensor, count: int) -> Tensor:
    """The sums of `count` neighbours: (..., d) -> (..., d / count)."""
    return _SumNeighbours.apply(x, count) if count > 1 else x


def add_repeated(y: Tensor, values: Tensor, count: int) -> Tensor:
    """y with each value added to `count` neighbours: (..., d) and (..., d / count) -> (..., d), all of one dtype.

    Never makes a repeated copy of the values.
    """
    return _AddRepeated.apply(y, values, count) if count > 1 else y + values


def sum_repeated(gradient: Tensor, count: int) -> Tensor:
    """The gradient of `add_repeated` by its values: (..., d) -> (..., d / count)."""
    return _sum(gradient, count) if count > 1 else gradient


class _SumNeighbours(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int) -> Tensor:
        ctx.count = count
        return _sum(x, count)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.unsqueeze(-1).expand(*gradient.shape, ctx.count).flatten(-2), None


class _AddRepeated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, values: Tensor, count: int) -> Tensor:
        ctx.count = count
        if y.device.type != "cpu" or count > 4:
            return (y.unflatten(-1, (-1, count)) + values.unsqueeze(-1)).flatten(-2)
        result = torch.empty_like(y)
        for offset in range(count):
            torch.add(y[..., offset::count], values, out=result[..., offset::count])
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradient, _sum(gradient, ctx.count), None


def _sum(x: Tensor, count: int) -> Tensor:
    # Not by halves with 16-bit types: a reduction sums those in float32.
    by_halves = count in (2, 4, 8) and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
    if not by_halves:
        return x.unflatten(-1, (-1, count)).sum(-1)
    while count > 1:
        x, count = x[..., 0::2] + x[..., 1::2], count // 2
    return x
