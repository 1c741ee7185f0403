"""The header of a step's reduction: the few numbers on which all ranks must agree, as fp32 lanes that are summed.

loss, tokens / 4096, tokens % 4096, stop, digest pieces, their squares, bad by rank, stats by rank, the task's sums
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_qft.training.digest_lanes import PIECES, digest_pieces, pieces_agree

# Sums in fp32 are exact up to 2^24. Split like this, counts and digests of up to 4096 ranks stay below.
_TOKEN_BASE = 4096  # two lanes count up to 2^36 tokens per step

_LOSS, _TOKENS_HIGH, _TOKENS_LOW, _STOP = range(4)
_DIGEST = slice(4, 4 + 2 * PIECES)
_FIXED_LANES = _DIGEST.stop


@dataclass(frozen=True)
class StepTotals:
    """The sums of one step's reduction, equal on all ranks.

    `tokens` (terms of the loss), `loss_sum` and `sums` are sums over ranks and micro-batches; `grad_norm` is the L2
    norm of the mean gradient; `stop` says that some rank was asked to stop; `rank_stats[rank]` are the numbers that
    rank sent about itself.
    """

    tokens: int
    loss_sum: float
    grad_norm: float
    stop: bool
    rank_stats: list[list[float]]
    sums: list[float]


class StepHeader:
    """One rank's lanes, which the reduction sums in place.

    Args:
        lanes: fp32, `lanes_needed` of them, on the device of the gradients.
        stats_size: numbers each rank may send along with a step.

    Attributes:
        loss: the first lane alone. Its sum depends on the order of adding; those of the others are exact, but for the
            task's sums, which nothing else is computed from.
    """

    def __init__(self, lanes: Tensor, rank: int, world: int, stats_size: int) -> None:
        self.lanes, self.loss = lanes, lanes[: _LOSS + 1]
        self._rank, self._world, self._stats_size = rank, world, stats_size
        self._sums = slice(self.lanes_needed(world, stats_size), None)

    @staticmethod
    def lanes_needed(world: int, stats_size: int, sums_size: int = 0) -> int:
        return _FIXED_LANES + world * (1 + stats_size) + sums_size

    def add_loss(self, loss_sum: float | Tensor, sums: Tensor | None = None) -> None:
        """Add a micro-batch's loss and its task's sums, and note that the loss is not finite."""
        self.loss += loss_sum
        if sums is not None:
            self.lanes[self._sums] += sums
        self.mark_bad(self.lanes[_LOSS])

    def mark_bad(self, number: Tensor) -> None:
        """Count in this rank's own lane that `number` is not finite; without waiting for the device."""
        self.lanes[_FIXED_LANES + self._rank] += (~torch.isfinite(number)).float()

    def fill(self, tokens: int, stop: bool, rank_stats: Sequence[float], digest_of: Tensor | None) -> None:
        """Write the rest of the lanes before they are summed; `digest_of` are the values that replicas compare."""
        lanes = self.lanes
        # A number rides with its kernel where it is filled in; to assign it would copy it, and make the host wait.
        high, low = divmod(tokens, _TOKEN_BASE)
        for lane, number in ((_TOKENS_HIGH, high), (_TOKENS_LOW, low), (_STOP, float(stop))):
            lanes[lane].fill_(number)
        if digest_of is not None:
            pieces = digest_pieces(digest_of)
            lanes[_DIGEST] = torch.cat([pieces, pieces * pieces])
        first = _FIXED_LANES + self._world + self._rank * self._stats_size
        for lane, number in enumerate(rank_stats, first):
            lanes[lane].fill_(number)

    def tokens(self) -> Tensor:
        """The summed number of target tokens, at least 1: a float64 scalar on the device."""
        counts = self.lanes[: _TOKENS_LOW + 1].double()
        return (counts[_TOKENS_HIGH] * _TOKEN_BASE + counts[_TOKENS_LOW]).clamp(min=1)

    def totals(self, lanes: Sequence[float], norm: float) -> StepTotals:
        """The summed lanes, read from the device, under their names."""
        everyone = lanes[_FIXED_LANES + self._world : self._sums.start]
        size = self._stats_size
        by_rank = [list(everyone[rank * size : (rank + 1) * size]) for rank in range(self._world)]
        tokens = int(lanes[_TOKENS_HIGH]) * _TOKEN_BASE + int(lanes[_TOKENS_LOW])
        return StepTotals(tokens, lanes[_LOSS], norm, lanes[_STOP] > 0, by_rank, list(lanes[self._sums]))

    def replicas_agree(self, lanes: Sequence[float]) -> bool:
        """True if all ranks sent the same digest."""
        return pieces_agree(list(lanes[_DIGEST]), self._world)

    def bad_ranks(self, lanes: Sequence[float]) -> list[int] | None:
        """The ranks that met a value which is not finite; [] if only the summed loss is none, None if all is well."""
        bad = [rank for rank in range(self._world) if lanes[_FIXED_LANES + rank] > 0]
        return bad or (None if math.isfinite(lanes[_LOSS]) else [])
