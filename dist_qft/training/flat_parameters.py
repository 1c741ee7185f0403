"""The trainables of every rank as one flat fp32 buffer, and the one reduction per optimizer step.

Parameters and their gradients are views into two flat buffers, so accumulating micro-batches costs no copies
and a bucket of the all-reduce is a slice. Gradients are *sums* over target tokens; the number of tokens rides
in a small header at the end of the same buffer, and the sum is divided once by the global count. Neither the
number of ranks nor the accumulation changes the gradient.

Layout of the gradient buffer (fp32 lanes):

    [ gradients, last parameter first | header ]
    header = tokens / 4096, tokens % 4096, loss, stop, digest pieces, their squares, bad by rank, stats by rank

Last parameter first, because backward finishes the last layer first: the first buckets can leave while
backward is still running. All that ranks must agree on each step (is anything non-finite, do the replicas
still match, has anyone been asked to stop) rides in the header: there is no second collective to forget.

That is the reduction `fast`. With a `FixedTree`, the reduction `invariant`, every micro-batch's buffer is a leaf of the
tree instead, header included, and the sum has the same bits on any number of ranks; nothing leaves during backward.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dist_qft.errors import NumericError
from dist_qft.ranks.digest import positional_digest
from dist_qft.training.digest_lanes import PIECES, digest_pieces, pieces_agree
from dist_qft.training.fixed_tree import FixedTree
from dist_qft.training.optimizer import gradient_norm

# Sums in fp32 are exact up to 2^24. Split like this, counts and digests of up to 4096 ranks stay below.
_TOKEN_BASE = 4096  # two lanes count up to 2^36 tokens per step

_TOKENS_HIGH, _TOKENS_LOW, _LOSS, _STOP = range(4)
_DIGEST = slice(4, 4 + 2 * PIECES)
_FIXED_LANES = _DIGEST.stop


@dataclass(frozen=True)
class StepTotals:
    """The sums of one step's reduction, equal on all ranks.

    `tokens` and `loss_sum` are sums over ranks and micro-batches; `grad_norm` is the L2 norm of the mean gradient;
    `stop` says that some rank was asked to stop; `rank_stats[rank]` are the numbers that rank sent about itself.
    """

    tokens: int
    loss_sum: float
    grad_norm: float
    stop: bool
    rank_stats: list[list[float]]


@dataclass
class _Bucket:
    start: int
    stop: int
    missing: int
    members: int


class FlatParameters:
    """Replicated parameters in a flat buffer, reduced once per optimizer step.

    Args:
        named: (name, parameter) in model order; every parameter fp32 and on one device.
        bucket_bytes: size of the slices that are reduced while backward still runs.
        group: a process group of its own, so that these reductions and the engine's gathers need no common order.
        rank_stats_size: numbers each rank may send along with a step.
        tree: sums the micro-batches in an order that the number of ranks does not change; its group is `group`.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, nn.Parameter]],
        *,
        bucket_bytes: int,
        group: dist.ProcessGroup | None = None,
        rank_stats_size: int = 0,
        tree: FixedTree | None = None,
    ) -> None:
        self.named = list(reversed(list(named)))
        device = self.named[0][1].device
        self.count = sum(parameter.numel() for _, parameter in self.named)
        self.values = nn.Parameter(torch.empty(self.count, device=device))
        self._group, self._rank_stats_size, self._tree = group, rank_stats_size, tree
        self._world, self._rank = dist.get_world_size(group), dist.get_rank(group)
        # One allocation for gradients and header: the last bucket takes the header along.
        lanes = _FIXED_LANES + self._world * (1 + rank_stats_size)
        self._reduced = torch.zeros(self.count + lanes, device=device)
        self._gradients = self._reduced[: self.count]
        self.values.grad = self._gradients
        self._header = self._reduced[self.count :]
        self.spans: dict[str, tuple[int, int]] = {}
        self._buckets: list[_Bucket] = []
        self._pending: list[dist.Work] = []
        self._hooks: list[RemovableHandle] = []
        self._launched = 0
        self._reducing = False
        self.reduced_bytes = 0
        self.rounds = 0
        self._lay_out(bucket_bytes)

    def _lay_out(self, bucket_bytes: int) -> None:
        start = 0
        for name, parameter in self.named:
            stop = start + parameter.numel()
            view = self.values.data[start:stop].view_as(parameter)
            view.copy_(parameter.data)
            parameter.data = view
            parameter.grad = self._reduced[start:stop].view_as(parameter)
            self.spans[name] = (start, stop)
            if not self._buckets or (stop - self._buckets[-1].start) * 4 > bucket_bytes:
                self._buckets.append(_Bucket(start, stop, 0, 0))
            bucket = self._buckets[-1]
            bucket.stop, bucket.members = stop, bucket.members + 1
            if self._tree is None:
                hook = partial(self._arrived, len(self._buckets) - 1)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(hook))
            start = stop
        self._buckets[-1].stop = self._reduced.numel()

    @property
    def bytes_per_reduction(self) -> int:
        """Bytes that one step reduces: 4 per trainable, and the header."""
        return self._reduced.nbytes

    @torch.no_grad()
    def broadcast(self) -> None:
        """Give every rank rank 0's values: replicas that start different train different models."""
        dist.broadcast(self.values.data, src=0, group=self._group)

    def close(self) -> None:
        """Remove our gradient hooks: they keep this object alive in a way that the garbage collector cannot see."""
        for hook in self._hooks:
            hook.remove()

    def begin_step(self) -> None:
        """Zero the gradients and the header; forget the last step's reduction."""
        self._reduced.zero_()
        self._launched = 0
        self._reducing = False
        if self._tree is not None:
            self._tree.clear()

    def reduce_during_backward(self) -> None:
        """Announce that the coming backward is the step's last: its buckets may leave as they fill."""
        self._reducing = True
        for bucket in self._buckets:
            bucket.missing = bucket.members

    @torch.no_grad()
    def end_micro_batch(self, loss_sum: float | Tensor) -> None:
        """Count the loss of the micro-batch whose backward has run: the sum over its target tokens."""
        self._header[_LOSS] += loss_sum
        self._mark_bad(self._header[_LOSS])
        if self._tree is not None:
            self._mark_bad(self._gradients.sum())
            if not self._reducing:  # the last one waits for the rest of the header
                self._tree.add(self._reduced)
                self._reduced.zero_()

    def _arrived(self, index: int, _: Tensor) -> None:
        if not self._reducing:
            return
        self._buckets[index].missing -= 1
        # Strictly in order, so that every rank issues the same sequence; the last one waits for the header.
        while self._launched < len(self._buckets) - 1 and self._buckets[self._launched].missing == 0:
            self._launch()

    @torch.no_grad()
    def _launch(self) -> None:
        bucket = self._buckets[self._launched]
        part = self._reduced[bucket.start : bucket.stop]
        gradients = self._reduced[bucket.start : min(bucket.stop, self.count)]
        # One read of the bucket before it is overwritten: afterwards nobody can tell whose value was bad.
        self._mark_bad(gradients.sum())
        self._pending.append(dist.all_reduce(part, group=self._group, async_op=True))
        self.reduced_bytes += part.nbytes
        self._launched += 1

    def _mark_bad(self, number: Tensor) -> None:
        """Count in this rank's own lane that `number` is not finite; without waiting for the device."""
        self._header[_FIXED_LANES + self._rank] += (~torch.isfinite(number)).float()

    @torch.no_grad()
    def reduce(
        self,
        *,
        tokens: int,
        step: int,
        check_digest: bool = False,
        stop: bool = False,
        rank_stats: Sequence[float] = (),
    ) -> StepTotals:
        """Finish the step's reduction and turn the summed gradient into the mean over target tokens.

        A GPU is read once, for the totals and the norm together.

        Args:
            tokens: this rank's sum over its micro-batches of the step.
            step: for messages.
            check_digest: also compare the replicas' values, and stop if they differ.
            stop: this rank was asked to stop.
            rank_stats: `rank_stats_size` numbers about this rank.

        Raises:
            NumericError: on every rank, at the same step, if a gradient or loss is not finite or replicas differ.
        """
        self._fill_header(tokens, check_digest, stop, rank_stats)
        if self._tree is not None:
            self._tree.reduce(self._reduced)
            self.reduced_bytes += self._reduced.nbytes
        else:
            self._finish_buckets()
        self._reducing = False
        self.rounds += 1
        lanes, norm = self._read()
        if check_digest and not pieces_agree(lanes[_DIGEST], self._world):
            self._name_difference(step)
        self._require_finite(lanes, norm, step)
        total = int(lanes[_TOKENS_HIGH]) * _TOKEN_BASE + int(lanes[_TOKENS_LOW])
        everyone = lanes[_FIXED_LANES + self._world :]
        size = self._rank_stats_size
        by_rank = [everyone[rank * size : (rank + 1) * size] for rank in range(self._world)]
        return StepTotals(total, lanes[_LOSS], norm, lanes[_STOP] > 0, by_rank)

    def _read(self) -> tuple[list[float], float]:
        """Divide the gradient by the number of target tokens; returns the header and the mean gradient's norm."""
        counts = self._header[: _TOKENS_LOW + 1].double()
        total = (counts[_TOKENS_HIGH] * _TOKEN_BASE + counts[_TOKENS_LOW]).clamp(min=1)
        self._gradients.div_(total.float())
        *lanes, norm = torch.cat([self._header.double(), gradient_norm(self._gradients)[None]]).tolist()
        return lanes, norm

    def _finish_buckets(self) -> None:
        while self._launched < len(self._buckets):
            self._launch()
        for work in self._pending:
            work.wait()
        self._pending.clear()

    def _fill_header(self, tokens: int, check_digest: bool, stop: bool, rank_stats: Sequence[float]) -> None:
        header = self._header
        header[_TOKENS_HIGH], header[_TOKENS_LOW] = divmod(tokens, _TOKEN_BASE)
        header[_STOP] = float(stop)
        if check_digest:
            pieces = digest_pieces(self.values.data)
            header[_DIGEST] = torch.cat([pieces, pieces * pieces])
        first = _FIXED_LANES + self._world + self._rank * self._rank_stats_size
        for lane, number in enumerate(rank_stats, first):  # a number rides with its kernel, a tensor would be copied
            header[lane] = number

    def _require_finite(self, lanes: list[float], norm: float, step: int) -> None:
        bad = [rank for rank in range(self._world) if lanes[_FIXED_LANES + rank] > 0]
        if not bad and math.isfinite(lanes[_LOSS]) and math.isfinite(norm):
            return
        first = self.first_non_finite(gradients=True) or "the loss"
        where = f"on rank {', '.join(map(str, bad))}" if bad else "in the sum over ranks"
        raise NumericError(f"step {step}: non-finite gradient {where}, first in {first}; nothing was updated")

    def first_non_finite(self, *, gradients: bool) -> str | None:
        """Name of the first parameter, in model order, with a value or gradient that is not finite; None if all are."""
        for name, parameter in reversed(self.named):
            tensor = parameter.grad if gradients else parameter.data
            if tensor is not None and not torch.isfinite(tensor).all():
                return name
        return None

    def _name_difference(self, step: int) -> None:
        names = [name for name, _ in reversed(self.named)]
        own = torch.stack([positional_digest(self.values.data[slice(*self.spans[name])]) for name in names])
        everyone = [torch.empty_like(own) for _ in range(self._world)]
        dist.all_gather(everyone, own, group=self._group)
        for index, name in enumerate(names):
            digests = [int(other[index]) for other in everyone]
            # The majority is taken for right; of two ranks that differ, nobody knows which one is.
            common = Counter(digests).most_common(1)[0][0]
            odd = [rank for rank, digest in enumerate(digests) if digest != common]
            if odd:
                ranks = ", ".join(map(str, odd))
                raise NumericError(
                    f"step {step}: replicas differ, first in {name}: "
                    f"rank {ranks} differs from rank {digests.index(common)}"
                )
        raise NumericError(f"step {step}: replicas differed when their digests were summed, but no tensor differs now")
