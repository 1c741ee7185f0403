"""Arithmetic on one layer: the weight that the live model computes with, by rows, before any rounding by a result.

That weight is the dequantized one plus the adapter's dW. With `merge_aware` it is the weight of the layer's folded
zeros: there the live model itself computes with rounded zeros. The exact fold is
`dist_qft.methods.adapters.exact_fold`; which rank holds which rows, and where results go, is decided by `collective`
and the writers.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dist_qft.errors import NumericError, UserError
from dist_qft.merge.difference import Difference
from dist_qft.methods.adapters.exact_fold import folds_exactly, tile_rows, with_folded_zeros
from dist_qft.methods.adapters.tile_adapter import TileAdapter
from dist_qft.quant.contract import Format, Shape, row_chunks


class Rows(NamedTuple):
    """Consecutive rows of one weight, float64: as the base has them, and as the live model computes with them."""

    base: Tensor
    live: Tensor


def update_rows(adapter: TileAdapter, start: int, stop: int) -> Tensor:
    """Rows start..stop of dW: float64 (stop - start, d_in)."""
    repeat, pool = adapter.settings.repeat, adapter.settings.pool
    top = start // repeat
    tiles = tile_rows(adapter, top, -(-stop // repeat))
    return tiles.repeat_interleave(pool, 1).repeat_interleave(repeat, 0)[start - top * repeat : stop - top * repeat]


def live_rows(
    format: Format, packed: Mapping[str, Tensor], shape: Shape, adapter: TileAdapter | None
) -> Iterator[Rows]:
    """A packed weight in chunks of rows, in order, without and with its adapter's dW."""
    base = _dequantized(format, packed, shape)
    if adapter is None:
        yield from (Rows(rows, rows) for _, rows in base)
    elif adapter.settings.merge_aware:
        folded = _dequantized(format, with_folded_zeros(format, packed, adapter), shape)
        yield from (Rows(before, after) for (_, before), (_, after) in zip(base, folded, strict=True))
    else:
        for where, rows in base:
            yield Rows(rows, rows + update_rows(adapter, where.start, where.stop).to(rows.device))


def live_weight(
    format: Format, packed: Mapping[str, Tensor], shape: Shape, adapter: TileAdapter | None, dtype: torch.dtype
) -> Tensor:
    """The whole weight that the live model computes with, each value rounded once to `dtype`."""
    return torch.cat([rows.live.to(dtype) for rows in live_rows(format, packed, shape, adapter)])


def converted(
    format: Format, packed: Mapping[str, Tensor], shape: Shape, adapter: TileAdapter | None, new: Format, where: str
) -> dict[str, Tensor]:
    """The weight that the live model computes with, packed in another format.

    If `new` differs in its constants alone and dW folds, the codes stay and constants are rounded. Otherwise the weight
    is quantized again.

    Raises:
        NumericError: the merged weight is not finite.
        UserError: `new` cannot hold it.
    """
    folds = adapter is None or folds_exactly(format, adapter.settings)
    if folds and new != format and new.keeps_codes_of(format):
        merged = dict(packed) if adapter is None else with_folded_zeros(format, packed, adapter)
        for name in merged.keys() - {"codes"}:
            require_numbers(merged[name], where)
        return new.from_stored(merged, format, where)
    exact = live_weight(format, packed, shape, adapter, torch.float32)
    require_numbers(exact, where)
    return new.quantize(exact, where)


def add_rows(difference: Difference, written: Tensor, exact: Iterable[Rows], adapted: bool) -> None:
    """Count a whole written weight against its exact rows, given in order; `adapted` if these have a dW."""
    first = 0
    for rows in exact:
        stop = first + len(rows.live)
        difference.add(written[first:stop], rows.live, rows.base if adapted else None)
        first = stop


def _dequantized(format: Format, packed: Mapping[str, Tensor], shape: Shape) -> Iterator[tuple[slice, Tensor]]:
    if format.row_local:
        pieces = format.row_pieces(packed, shape, torch.float32)
    else:
        whole = format.dequantize(packed, shape, torch.float32)
        pieces = ((rows, whole[rows]) for rows in row_chunks(shape, whole.device, format.row_alignment))
    for where, rows in pieces:
        yield where, rows.double()


def require_numbers(values: Tensor, where: str) -> None:
    """Refuse weights that are NaN or infinite before they are rounded. NumericError."""
    if not torch.isfinite(values).all():
        raise NumericError(f"{where}: the merged weight has values that are not finite; the adapter is unusable")


def require_range(rounded: Tensor, exact: Tensor, where: str) -> None:
    """Refuse values that left the range of the dtype they were rounded to.

    Raises:
        UserError: the exact values are finite.
        NumericError: they are not.
    """
    if torch.isfinite(rounded).all():
        return
    require_numbers(exact, where)
    raise UserError(
        f"{where}: merged values up to {float(exact.abs().max()):.3g} leave the range of "
        f"{str(rounded.dtype).removeprefix('torch.')}; use merge --to dense with --dtype float32 or bfloat16"
    )
