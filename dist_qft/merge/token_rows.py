"""Trained rows of vocabulary tables (`method.train_tokens`) in a result: as the live model has them, and as written."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_qft.base_model.skeleton import BaseModel
from dist_qft.errors import NumericError
from dist_qft.merge.difference import Difference
from dist_qft.methods.adapters.attach import AdapterSet
from dist_qft.quant.contract import Format
from dist_qft.quant.frozen import FrozenEmbedding
from dist_qft.quant.row_update import RowValues, with_difference


@dataclass(frozen=True)
class TokenRowsInUse:
    """The rows of some tokens in one table.

    Attributes:
        ids: (n,) int64, ascending, on the CPU.
        base, live: (n, width) float32 on the CPU: as the base has them, and as the live model computes with them.
    """

    ids: Tensor
    base: Tensor
    live: Tensor

    def within(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The rows that lie in start..stop of the table: their places from `start` on, and the live values."""
        inside = (self.ids >= start) & (self.ids < stop)
        return self.ids[inside] - start, self.live[inside]

    def others(self, start: int, count: int) -> Tensor:
        """True for each of the rows `start` to `start + count` of the table that is not trained."""
        kept = torch.ones(count, dtype=torch.bool)
        kept[self.within(start, start + count)[0]] = False
        return kept

    def put_into(self, rows: Tensor, start: int) -> Tensor:
        """The rows `start`, `start + 1`, ... of the table with the live values among them, in their dtype."""
        places, values = self.within(start, start + len(rows))
        return rows.index_copy(0, places, values.to(rows.dtype)) if len(places) else rows

    def packed_into(self, packed: Mapping[str, Tensor], format: Format, where: str) -> dict[str, Tensor]:
        """A table's packed tensors with the live rows in its own format."""
        rows = format.quantize(self.live, where)
        return {name: tensor.index_copy(0, self.ids, rows[name].to(tensor.dtype)) for name, tensor in packed.items()}


@torch.no_grad()
def token_rows(base: BaseModel, adapters: AdapterSet) -> dict[str, TokenRowsInUse]:
    """The trained rows by their table's path, read from the base under its engine. Collective if there are any.

    Raises:
        NumericError: a row is not finite.
    """
    if adapters.token_rows is None:
        return {}
    found, tables = {}, base.tables()
    for path, delta in adapters.token_rows.deltas.items():
        table = tables[path]
        ids = torch.tensor(adapters.token_rows.tokens.ids, device=delta.device)
        with adapters.disabled():
            own = table(ids, use=FrozenEmbedding.rows_of)
        live = with_difference(own, delta)
        if not torch.isfinite(live).all():
            raise NumericError(f"{path}: a trained row has values that are not finite; the adapter is unusable")
        found[path] = TokenRowsInUse(ids.cpu(), own.float().cpu(), live.float().cpu())
    return found


@contextmanager
def reading(base: BaseModel, ids: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> Iterator[None]:
    """Context in which the base's tables have these values (n, width) in the rows `ids`, by table."""
    tables = base.tables()
    before = {path: tables[path].changed for path in rows}
    for path, values in rows.items():
        device = next(tables[path].parameters()).device
        tables[path].changed = RowValues(ids[path].tolist(), values.to(device), before[path])
    try:
        yield
    finally:
        for path, changed in before.items():
            tables[path].changed = changed


def rounded_rows(rows: TokenRowsInUse, format: Format, where: str) -> Tensor:
    """The live rows as a table of this format gives them back, (n, width) float32."""
    shape = (rows.live.shape[0], rows.live.shape[1])
    return format.dequantize(format.quantize(rows.live, where), shape, torch.float32)


def add_token_rows(difference: Difference, written: Tensor, rows: TokenRowsInUse) -> None:
    """Count rows as written, (n, width)."""
    difference.add(written, rows.live, rows.base)


def rounding_notes(
    written: Mapping[str, Tensor], rows: Mapping[str, TokenRowsInUse], forms: Mapping[str, str]
) -> list[str]:
    """A line for each table whose trained rows are rounded to the form that it has in the result, by how much."""
    lines = []
    for path, values in written.items():
        distance = float((values - rows[path].live).abs().max())
        if distance > 0:
            count = len(rows[path].ids)
            lines.append(f"{count} trained rows of {path} are stored as {forms[path]}, off by {distance:.1e} at most")
    return lines
