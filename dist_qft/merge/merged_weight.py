"""Arithmetic on one layer: its weight plus the adapter's dW by rows, and the merges that round.

The exact fold is `dist_qft.methods.adapters.exact_fold`. Which rank holds which rows, and where results go, is
`collective` and the writers.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dist_qft.errors import UserError
from dist_qft.methods.adapters.exact_fold import tile_rows
from dist_qft.methods.adapters.tile_adapter import TileAdapter
from dist_qft.quant.contract import Format, Shape, row_chunks


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
