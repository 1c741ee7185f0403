"""The division of the flat buffer into buckets, and of each bucket into one slice per rank.

With `train.shard_optimizer` every rank updates 1/N of each bucket, the N-th part in the order of the ranks (the layout
of Megatron-LM's distributed optimizer), so a bucket can be reduced and scattered as soon as backward has filled it:

    [ bucket 0: rank 0 | rank 1 | ... ][ bucket 1: rank 0 | rank 1 | ... ] ... padding

Slices begin and end at multiples of a block, so an optimizer that keeps one constant per block has the same blocks as
one that holds the whole buffer. Only the last bucket is filled up, by less than a block per rank.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

BLOCK = 256  # values that share a constant in an 8-bit optimizer (bitsandbytes)

Range = tuple[int, int]  # first element, and one past the last


def padded_slice(count: int, world: int, block: int = BLOCK) -> int:
    """The values that each of `world` ranks updates if the optimizer of `count` values is spread over them."""
    return -(-count // (world * block)) * block if world > 1 else count


@dataclass(frozen=True)
class Slices:
    """One rank's slices of a flat buffer; those of all ranks have the same sizes.

    Attributes:
        count: values in the buffer, padding excluded.
        world: ranks that share the buffer; 1 if every rank updates all of it.
        bounds: bucket k has the elements bounds[k] to bounds[k + 1] - 1; the last bound is `count` with the padding.
    """

    count: int
    world: int
    rank: int
    bounds: tuple[int, ...]

    @classmethod
    def whole(cls, ends: Sequence[int]) -> "Slices":
        """The slices of a rank that updates everything, with buckets that end at `ends`."""
        return cls(ends[-1], 1, 0, (0, *ends))

    @classmethod
    def divide(cls, ends: Sequence[int], world: int, rank: int, block: int = BLOCK) -> "Slices":
        """The slices of one of `world` ranks. Bucket ends move down to what the ranks can share, the last one up."""
        unit = world * block
        last = world * padded_slice(ends[-1], world, block)
        inner = (end // unit * unit for end in ends[:-1])
        return cls(ends[-1], world, rank, tuple(sorted({0, *inner, last})))

    @property
    def padded(self) -> int:
        return self.bounds[-1]

    @property
    def buckets(self) -> list[Range]:
        return list(pairwise(self.bounds))

    def piece(self, bucket: Range, rank: int | None = None) -> Range:
        """The part of a bucket that belongs to `rank`, by default this one."""
        start, stop = bucket
        size = (stop - start) // self.world
        first = start + size * (self.rank if rank is None else rank)
        return first, first + size

    @cached_property
    def own(self) -> tuple[Range, ...]:
        """This rank's slices in the order of the buffer, padding included."""
        return ((0, self.padded),) if self.world == 1 else tuple(self.piece(bucket) for bucket in self.buckets)

    @cached_property
    def updated(self) -> tuple[Range, ...]:
        """This rank's slices as its optimizer sees them: without padding, but for a slice that has nothing else.

        For an 8-bit optimizer padding would be part of the last block, and a vectorized one computes a tensor's end in
        other code, which may round otherwise.
        """
        return tuple((start, min(stop, self.count) if start < self.count else stop) for start, stop in self.own)

    def buckets_of(self, span: Range) -> range:
        """The numbers of the buckets that elements of `span` lie in."""
        inside = [k for k, (start, stop) in enumerate(self.buckets) if start < span[1] and stop > span[0]]
        return range(inside[0], inside[-1] + 1)

    def within(self, spans: Iterable[Range]) -> list[tuple[int, int, int]]:
        """The parts of `spans` that this rank updates: number of the slice, first and one-past-last element in it."""
        spans = list(spans)
        found = []
        for number, (start, stop) in enumerate(self.own):
            for first, last in spans:
                if max(first, start) < min(last, stop):
                    found.append((number, max(first, start) - start, min(last, stop) - start))
        return found


def bucket_ends(sizes: Sequence[int], bucket_values: float) -> list[int]:
    """Ends of buckets of at most so many values, each of whole parameters; a larger parameter has its own."""
    ends: list[int] = []
    start = stop = 0
    for size in sizes:
        if stop > start and stop + size - start > bucket_values:
            ends.append(stop)
            start = stop
        stop += size
    return [*ends, stop]
