"""Tensors that are made of other tensors of the files, read box by box: a part of one costs no more than that part.

A checkpoint may hold one tensor per expert where the model has a stack, a fused tensor where the model has three, a
matrix the other way round. Each of these is a `View`: it knows its shape, and which part of which stored tensor a part
of it comes from. Nothing is read before `read`.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from dist_qft.base_model.sources import TensorSource, read_box

_T = TypeVar("_T")
Range = tuple[int, int]
Box = tuple[Range, ...]  # for each dimension the first and one past the last index


class View(ABC):
    """A tensor that can be read in boxes."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""

    @abstractmethod
    def read(self, box: Box) -> Tensor:
        """The part of the tensor in a box that is not empty; to be read, not written to nor kept."""

    @abstractmethod
    def leaves(self) -> Iterator["Stored"]:
        """The stored tensors that this one is made of."""

    def runs(self) -> "list[Run] | None":
        """The stored rows that make up this tensor's rows, in order, all but the last dimension counted as rows.

        None if it is not made of whole stored rows.
        """
        return None


@dataclass(frozen=True)
class Stored(View):
    """A tensor as a file holds it."""

    source: TensorSource
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape(self.name)

    def read(self, box: Box) -> Tensor:
        return read_box(self.source, self.name, box)

    def leaves(self) -> Iterator["Stored"]:
        yield self

    def runs(self) -> "list[Run]":
        return [Run(self, 0, math.prod(self.shape[:-1]))]


@dataclass(frozen=True)
class Run:
    """Rows `first` to `stop` of a stored tensor, all but its last dimension counted as rows."""

    tensor: Stored
    first: int
    stop: int

    @property
    def whole(self) -> bool:
        return (self.first, self.stop) == (0, math.prod(self.tensor.shape[:-1]))


@dataclass(frozen=True)
class Stacked(View):
    """Tensors of one shape as entries of a new first dimension."""

    parts: tuple[View, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.parts), *self.parts[0].shape

    def read(self, box: Box) -> Tensor:
        first, stop = box[0]
        return torch.stack([part.read(box[1:]) for part in self.parts[first:stop]])

    def leaves(self) -> Iterator[Stored]:
        return itertools.chain.from_iterable(part.leaves() for part in self.parts)

    def runs(self) -> list[Run] | None:
        return _chained([part.runs() for part in self.parts])


@dataclass(frozen=True)
class Joined(View):
    """Tensors one behind the other along a dimension that exists."""

    parts: tuple[View, ...]
    dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.parts[0].shape)
        shape[self.dim] = sum(part.shape[self.dim] for part in self.parts)
        return tuple(shape)

    def read(self, box: Box) -> Tensor:
        pieces, start = [], 0
        first, stop = box[self.dim]
        for part in self.parts:
            size = part.shape[self.dim]
            inside = max(first - start, 0), min(stop - start, size)
            if inside[0] < inside[1]:
                pieces.append(part.read(_replaced(box, self.dim, inside)))
            start += size
        return torch.cat(pieces, dim=self.dim)

    def leaves(self) -> Iterator[Stored]:
        return itertools.chain.from_iterable(part.leaves() for part in self.parts)

    def runs(self) -> list[Run] | None:
        if self.dim == 0:
            return _chained([part.runs() for part in self.parts])
        if self.dim == len(self.shape) - 1:
            return None
        # Along the rows of each entry of a stack: entry by entry, then part by part.
        runs = [part.runs() for part in self.parts]
        count = self.shape[0]
        if self.dim != 1 or any(found is None or len(found) != count for found in runs):
            return None
        return [found[entry] for entry in range(count) for found in runs if found is not None]


@dataclass(frozen=True)
class Part(View):
    """Entries `first` to `stop` of a tensor along one dimension."""

    whole: View
    dim: int
    first: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.whole.shape)
        shape[self.dim] = self.stop - self.first
        return tuple(shape)

    def read(self, box: Box) -> Tensor:
        first, stop = box[self.dim]
        return self.whole.read(_replaced(box, self.dim, (first + self.first, stop + self.first)))

    def leaves(self) -> Iterator[Stored]:
        return self.whole.leaves()

    def runs(self) -> list[Run] | None:
        whole = self.whole.runs()
        if whole is None or len(whole) != 1 or self.dim != 0:
            return None
        height = math.prod(self.shape[1:-1])  # rows of one entry
        return [Run(whole[0].tensor, whole[0].first + self.first * height, whole[0].first + self.stop * height)]


@dataclass(frozen=True)
class Swapped(View):
    """A tensor with two of its dimensions exchanged."""

    whole: View
    first_dim: int
    second_dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self._exchanged(self.whole.shape)

    def read(self, box: Box) -> Tensor:
        return self.whole.read(self._exchanged(box)).transpose(self.first_dim, self.second_dim)

    def leaves(self) -> Iterator[Stored]:
        return self.whole.leaves()

    def _exchanged(self, values: tuple[_T, ...]) -> tuple[_T, ...]:
        changed = list(values)
        changed[self.first_dim], changed[self.second_dim] = values[self.second_dim], values[self.first_dim]
        return tuple(changed)


@dataclass(frozen=True, eq=False)
class Reordered(View):
    """A tensor whose entries along one dimension come in another order: entry i is the whole's entry `order[i]`."""

    whole: View
    dim: int
    order: Tensor  # int64, one for each entry

    @property
    def shape(self) -> tuple[int, ...]:
        return self.whole.shape

    def read(self, box: Box) -> Tensor:
        first, stop = box[self.dim]
        wanted = self.order[first:stop]
        low, high = int(wanted.min()), int(wanted.max()) + 1
        return self.whole.read(_replaced(box, self.dim, (low, high))).index_select(self.dim, wanted - low)

    def leaves(self) -> Iterator[Stored]:
        return self.whole.leaves()


def swapped(view: View, first_dim: int, second_dim: int) -> View:
    """The view with two of its dimensions exchanged; exchanged twice, it is the view itself."""
    if isinstance(view, Swapped) and {view.first_dim, view.second_dim} == {first_dim, second_dim}:
        return view.whole
    return Swapped(view, first_dim, second_dim)


def read_rows(view: View, first: int, stop: int) -> Tensor:
    """Rows first..stop of a tensor of two or three dimensions, all but the last counted as rows: (rows, columns)."""
    *leading, columns = view.shape
    if first == stop:
        return torch.empty(0, columns)
    if len(leading) == 1:
        return view.read(((first, stop), (0, columns)))
    height = leading[1]
    pieces = []
    for entry in range(first // height, -(-stop // height)):
        inside = max(first - entry * height, 0), min(stop - entry * height, height)
        pieces.append(view.read(((entry, entry + 1), inside, (0, columns)))[0])
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _chained(parts: Sequence[list[Run] | None]) -> list[Run] | None:
    runs: list[Run] = []
    for part in parts:
        if part is None:
            return None
        runs += part
    return runs


def _replaced(box: Box, dim: int, inside: Range) -> Box:
    return *box[:dim], inside, *box[dim + 1 :]
