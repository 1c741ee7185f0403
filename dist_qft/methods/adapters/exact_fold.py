"""The exact fold of dW into a layer's zeros, and the conditions under which it is possible.

With w = scale * q + zero, a dW that is constant on every block only moves the zeros: zero' = zero + dW, codes and
scales stay as they are (QA-LoRA, arXiv 2309.14717; QA-HiRA, arXiv 2407.17029). All sums are made in float64 and
rounded once, to the zero's own dtype: that rounding is the whole error. A merge writes these zeros, and with
`method.merge_aware` training already computes with them. The format says which of its tensors are the zeros.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from dist_qft.divisors import either
from dist_qft.methods.adapters.schedule import TileSettings
from dist_qft.methods.adapters.tile_adapter import TileAdapter
from dist_qft.quant.contract import FoldTarget, Format
from dist_qft.quant.frozen import FrozenWeight

_ROWS = 256  # tile rows multiplied at a time


def zeros_of(format: Format) -> FoldTarget:
    """The tensor that takes dW, and its block. Raises ValueError for a format that has none."""
    if format.fold_target is None:
        raise ValueError(f"{format.name}: {format.fold_obstacle}")
    return format.fold_target


def folding_obstacle(tiles: Mapping[str, TileSettings], layers: Mapping[str, FrozenWeight]) -> str | None:
    """The reason why not all adapters of these tiles fold exactly, and the nearest settings that would; or None."""
    faults = []
    for path, settings in tiles.items():
        if fault := _obstacle(path, layers[path].format, settings):
            faults.append(fault)
    more = f" (and {len(faults) - 1} more layers)" if len(faults) > 1 else ""
    return f"{faults[0]}{more}" if faults else None


def folds_exactly(format: Format, settings: TileSettings) -> bool:
    """True if an adapter of these tiles folds exactly into a weight in this format."""
    return _obstacle("", format, settings) is None


def _obstacle(path: str, format: Format, settings: TileSettings) -> str | None:
    target = format.fold_target
    if target is None:
        return f"{path} is {format.name}, {format.fold_obstacle}; choose quantization.linear: affine4"
    faults = []
    sides = (("repeat", settings.repeat, settings.out_features), ("pool", settings.pool, settings.in_features))
    for (knob, value, size), block in zip(sides, target.block, strict=True):
        if value % block:
            legal = [factor for factor in range(block, size + 1, block) if size % factor == 0]
            nearest = sorted(sorted(legal, key=lambda factor: abs(factor - value))[:2])
            faults.append(f"{knob} {value} is not a multiple of {block} (nearest: {either(nearest)})")
    return f"blocks of {list(target.block)} cross the tiles of {path}: {'; '.join(faults)}" if faults else None


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
    first_tile, last_tile = (row * block[0] // settings.repeat for row in (top, bottom - 1))
    tiles = tile_rows(adapter, first_tile, last_tile + 1).to(part.device)
    if settings.repeat != block[0]:
        tiles = tiles[torch.arange(top, bottom, device=part.device) * block[0] // settings.repeat - first_tile]
    if settings.pool != block[1]:
        tiles = tiles[:, torch.arange(width, device=part.device) * block[1] // settings.pool]
    update = tiles.flatten()[first - top * width :][: part.numel()]
    exact = part.double() + update
    return (_to_float16(exact) if part.dtype == torch.float16 else exact.to(part.dtype)), exact


@torch.no_grad()
def with_folded_zeros(format: Format, packed: Mapping[str, Tensor], adapter: TileAdapter) -> dict[str, Tensor]:
    """A whole layer's packed tensors with dW in the zeros, as a merge would write them."""
    target = zeros_of(format)
    constants = packed[target.tensor]
    written, _ = folded(constants.reshape(-1), 0, constants.shape[1], target.block, adapter)
    return {**packed, target.tensor: written.view_as(constants)}


@torch.no_grad()
def tile_rows(adapter: TileAdapter, start: int, stop: int) -> Tensor:
    """Rows start..stop of the tile values of dW: float64 (stop - start, d_in / p); experts lie below each other.

    Products are taken over blocks of rows at fixed places, so a row's bits do not depend on which others a rank holds.
    """
    scale = adapter.settings.tile_scale
    if adapter.B is None:
        return adapter.A[start:stop].double() * scale
    settings = adapter.settings
    height = settings.out_features // settings.repeat  # of one expert, or of the only matrix
    pieces = []
    for matrix, (left, right) in enumerate(adapter.pairs()):
        first, last = max(start - matrix * height, 0), min(stop - matrix * height, height)
        if first < last:
            begin, wide = first // _ROWS * _ROWS, right.double()
            blocks = [left[row : row + _ROWS].double() @ wide for row in range(begin, last, _ROWS)]
            pieces.append(torch.cat(blocks)[first - begin : last - begin])
    return torch.cat(pieces) * scale


def _to_float16(exact: Tensor) -> Tensor:
    """float64 rounded once to the nearest float16, ties to even. torch itself goes through float32 and rounds twice.

    Rounding to odd in between keeps the side of a tie on which the value lies, which the second rounding needs.
    """
    single = exact.float()
    bits = single.view(torch.int32)
    bits -= (single.double().abs() > exact.abs()).int()  # towards zero: one step less in magnitude, whatever the sign
    bits |= (single.double() != exact).int()
    return single.half()
