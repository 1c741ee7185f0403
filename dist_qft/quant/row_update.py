"""Learned differences of a few rows of a vocabulary table, which everything that reads the table sees.

The table stays frozen and sharded as it is; the differences are small and lie whole on every rank.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor


class ChangedRows(Protocol):
    """Rows that a vocabulary table has in place of its own (`FrozenEmbedding.changed`)."""

    def among(self, rows: Tensor, ids: Tensor) -> Tensor:
        """The rows (n, dim) of these ids (n,), those that are changed in place of the table's own; dtype as given."""

    def between(self, rows: Tensor, start: int, stop: int) -> Tensor:
        """The rows start..stop, likewise."""


class RowUpdate:
    """Rows of a table with a difference each, added in float32 and rounded once to the compute dtype.

    Args:
        ids: the rows' numbers, ascending and different.
        delta: (n, dim) float32, the differences; a trainable parameter.

    Attributes:
        enabled: False leaves the table as it is.
    """

    def __init__(self, ids: Sequence[int], delta: Tensor) -> None:
        self.numbers = list(ids)
        self.ids = torch.tensor(self.numbers, dtype=torch.int64, device=delta.device)
        self.delta = delta
        self.enabled = True

    @contextmanager
    def off(self) -> Iterator[None]:
        """Context in which the table is as it is."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def places(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Of each id (n,) a place in `ids`, and whether it is there at all; for others the place means nothing."""
        places = torch.searchsorted(self.ids, ids).clamp_(max=len(self.numbers) - 1)
        return places, self.ids[places] == ids

    @torch.no_grad()
    def among(self, rows: Tensor, ids: Tensor) -> Tensor:
        """See `ChangedRows`."""
        if not self.enabled:
            return rows
        places, changed = self.places(ids)
        return torch.where(changed[:, None], with_difference(rows, self.delta[places]), rows)

    @torch.no_grad()
    def between(self, rows: Tensor, start: int, stop: int) -> Tensor:
        """See `ChangedRows`."""
        part = _part(self.numbers, start, stop)
        if not self.enabled or part.start == part.stop:
            return rows
        places = self.ids[part] - start
        return rows.index_copy(0, places, with_difference(rows[places], self.delta[part]))


class RowValues:
    """Rows of a table with other values, as a result will store them.

    Args:
        ids: the rows' numbers, ascending and different.
        values: (n, dim).
        first: what changes the table's rows before.
    """

    def __init__(self, ids: Sequence[int], values: Tensor, first: ChangedRows | None = None) -> None:
        self._numbers, self._values, self._first = list(ids), values, first
        self._ids = torch.tensor(self._numbers, dtype=torch.int64, device=values.device)

    def among(self, rows: Tensor, ids: Tensor) -> Tensor:
        """See `ChangedRows`."""
        if self._first is not None:
            rows = self._first.among(rows, ids)
        places = torch.searchsorted(self._ids, ids).clamp_(max=len(self._numbers) - 1)
        return torch.where((self._ids[places] == ids)[:, None], self._values[places].to(rows.dtype), rows)

    def between(self, rows: Tensor, start: int, stop: int) -> Tensor:
        """See `ChangedRows`."""
        if self._first is not None:
            rows = self._first.between(rows, start, stop)
        part = _part(self._numbers, start, stop)
        if part.start == part.stop:
            return rows
        return rows.index_copy(0, self._ids[part] - start, self._values[part].to(rows.dtype))


def with_difference(rows: Tensor, delta: Tensor) -> Tensor:
    """Rows plus their differences, in the dtype of the rows."""
    return (rows.to(delta.dtype) + delta).to(rows.dtype)


def _part(numbers: Sequence[int], start: int, stop: int) -> slice:
    """The part of ascending `numbers` that lies in start..stop."""
    return slice(bisect_left(numbers, start), bisect_left(numbers, stop))
