"""The trainables of every rank as one flat fp32 buffer, and the one reduction per optimizer step.

Parameters and their gradients are views into two flat buffers, so accumulating micro-batches costs no copies and a
bucket of the reduction is a slice. Gradients are *sums* over target tokens, or pairs where answers are compared; their
number rides in a header at the end of the buffer, and the sum is divided once by the global count.

Layout of the gradient buffer (fp32 lanes):

    [ gradients, last parameter first | padding | header (`step_header`) ]

Last parameter first, because backward finishes the last layer first: the first buckets leave while it still runs. All
that ranks must agree on each step (finite values, equal replicas, a stop) rides in the header: no second collective.

That is the reduction `fast`. With a `FixedTree`, the reduction `invariant`, every micro-batch's buffer is a leaf of the
tree instead, header included, and the sum has the same bits on any number of ranks; nothing leaves during backward.

With `shard` the optimizer is spread over the ranks (`train.shard_optimizer`; ZeRO stage 1, arXiv 1910.02054): each
bucket is reduced and scattered, a rank updates its slices alone (`slices`), and the new values are gathered. The header
and the norm of the gradient, of which no rank has the whole, are two small collectives then. Only then is
there padding.
"""

import math
from collections.abc import Iterable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dist_qft.errors import NumericError
from dist_qft.ranks.collectives import Started, all_gather_flat, gather_in_place, start_reduce_scatter
from dist_qft.training.fixed_tree import FixedTree
from dist_qft.training.norms import chunk_size, chunk_squares, gradient_norm, norm_of_chunks
from dist_qft.training.replicas import name_difference
from dist_qft.training.slices import BLOCK, Range, Slices, bucket_ends
from dist_qft.training.step_header import StepHeader, StepTotals


class FlatParameters:
    """Replicated parameters in a flat buffer, reduced once per optimizer step.

    Args:
        named: (name, parameter) in model order; every parameter fp32 and on one device.
        bucket_bytes: size of the slices that are reduced while backward still runs.
        group: a process group of its own, so that these reductions and the engine's gathers need no common order.
        rank_stats_size, sums_size: numbers each rank may send along with a step, and that are summed like the loss.
        tree: sums the micro-batches in an order that the number of ranks does not change; its group is `group`.
        shard: let each rank update only its slices.

    Attributes:
        values: all trainables; `values.grad` is their gradient, with `shard` the summed one in this rank's slices only.
        parts: the parameters for this rank's optimizer, views of `values`: just `values`, or this rank's slices.
        spans: first and one-past-last element of each trainable in `values`.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, nn.Parameter]],
        *,
        bucket_bytes: int,
        group: dist.ProcessGroup | None = None,
        rank_stats_size: int = 0,
        sums_size: int = 0,
        tree: FixedTree | None = None,
        shard: bool = False,
    ) -> None:
        self.named = list(reversed(list(named)))
        device = self.named[0][1].device
        sizes = [parameter.numel() for _, parameter in self.named]
        self.count = sum(sizes)
        self._group, self._tree = group, tree
        world, rank = dist.get_world_size(group), dist.get_rank(group)
        self._chunk = chunk_size(self.count) if tree else BLOCK
        ends = [self.count] if tree else bucket_ends(sizes, bucket_bytes / 4)
        self.shard = shard = shard and world > 1
        self.slices = Slices.divide(ends, world, rank, self._chunk) if shard else Slices.whole(ends)
        # One allocation for gradients and header: without `shard`, the last bucket takes the header along.
        padded = self.slices.padded
        size = padded + StepHeader.lanes_needed(world, rank_stats_size, sums_size)
        self._reduced = torch.zeros(size, device=device)
        self._header = StepHeader(self._reduced[padded:], rank, world, rank_stats_size)
        # The tree has its own order for what rounds: the gradients and, as the header's first lane, the loss.
        self._leaf = self._reduced[: padded + 1] if shard else self._reduced
        self._storage = torch.zeros(padded, device=device)
        self.values = nn.Parameter(self._storage[: self.count])
        self.values.grad = self._reduced[: self.count]
        self.parts = [self.values]
        if shard:
            self.parts = [nn.Parameter(self._storage[slice(*updated)]) for updated in self.slices.updated]
            for part, updated in zip(self.parts, self.slices.updated, strict=True):
                part.grad = self._reduced[slice(*updated)]
        self.spans: dict[str, Range] = {}
        self._members = [0] * len(self.slices.buckets)
        self._missing = list(self._members)
        self._pending: list[Started] = []
        self._hooks: list[RemovableHandle] = []
        self._launched = 0
        self._reducing = False
        self.reduced_bytes = 0
        self.rounds = 0
        self._lay_out()

    def _lay_out(self) -> None:
        start = 0
        for name, parameter in self.named:
            stop = start + parameter.numel()
            view = self.values.data[start:stop].view_as(parameter)
            view.copy_(parameter.data)
            parameter.data = view
            parameter.grad = self._reduced[start:stop].view_as(parameter)
            self.spans[name] = (start, stop)
            if self._tree is None:
                buckets = self.slices.buckets_of((start, stop))
                for bucket in buckets:
                    self._members[bucket] += 1
                self._hooks.append(parameter.register_post_accumulate_grad_hook(partial(self._arrived, buckets)))
            start = stop

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
        self._missing = list(self._members)

    @torch.no_grad()
    def end_micro_batch(self, loss_sum: float | Tensor, sums: Tensor | None = None) -> None:
        """Count the loss of the micro-batch whose backward has run, the sum over its terms, and `sums_size` others."""
        self._header.add_loss(loss_sum, sums)
        if self._tree is not None:
            self._header.mark_bad(self._reduced[: self.count].sum())
            if not self._reducing:  # the last one waits for the rest of the header
                self._tree.add(self._leaf)
                self._leaf.zero_()

    def _arrived(self, buckets: range, _: Tensor) -> None:
        if not self._reducing:
            return
        for bucket in buckets:
            self._missing[bucket] -= 1
        # Strictly in order, so that every rank issues the same sequence; the last one waits for the header.
        while self._launched < len(self._missing) - 1 and self._missing[self._launched] == 0:
            self._launch()

    @torch.no_grad()
    def _launch(self) -> None:
        bucket = self.slices.buckets[self._launched]
        self._launched += 1
        # One read of the bucket before it is overwritten: afterwards nobody can tell whose value was bad.
        self._header.mark_bad(self._reduced[bucket[0] : min(bucket[1], self.count)].sum())
        if self.shard:
            whole, own = self._reduced[slice(*bucket)], self._reduced[slice(*self.slices.piece(bucket))]
            self._pending.append(start_reduce_scatter(whole, own, self._group))
        else:
            last = self._launched == len(self._missing)
            whole = self._reduced[bucket[0] :] if last else self._reduced[slice(*bucket)]
            self._pending.append(dist.all_reduce(whole, group=self._group, async_op=True))

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
        self._header.fill(tokens, stop, rank_stats, self.values.data if check_digest else None)
        if self._tree is None:
            self._finish_buckets()
        elif self.shard:
            own = self._tree.reduce_scatter(self._leaf, self._own_gradients[0].numel(), shared=1)
            self._own_gradients[0].copy_(own[:-1])
            self._header.loss.copy_(own[-1:])
            dist.all_reduce(self._header.lanes[1:], group=self._group)
        else:
            self._tree.reduce(self._reduced)
        self._reducing = False
        self.reduced_bytes += self._reduced.nbytes
        self.rounds += 1
        lanes, norm = self._read()
        if check_digest and not self._header.replicas_agree(lanes):
            raise name_difference(self.values.data, dict(reversed(self.spans.items())), step, self._group)
        self._require_finite(lanes, norm, step)
        return self._header.totals(lanes, norm)

    def _finish_buckets(self) -> None:
        while self._launched < len(self._missing):
            self._launch()
        if self.shard:
            self._pending.append(dist.all_reduce(self._header.lanes, group=self._group, async_op=True))
        for work in self._pending:
            work.wait()
        self._pending.clear()

    @property
    def _own_gradients(self) -> list[Tensor]:
        """The parts of the gradient buffer that have the sum over ranks and that this rank's optimizer reads."""
        return [self._reduced[slice(*own)] for own in self.slices.own]

    def _read(self) -> tuple[list[float], float]:
        """Divide the gradient by the number of target tokens; returns the header and the mean gradient's norm."""
        total = self._header.tokens().float()
        for gradient in self._own_gradients:
            gradient.div_(total)
        *lanes, norm = torch.cat([self._header.lanes.double(), self._norm()[None]]).tolist()
        return lanes, norm

    def _norm(self) -> Tensor:
        own = self._own_gradients
        if self._tree is None:
            return gradient_norm(self._from_all(gradient_norm(*own)[None]))
        squares = self._from_all(chunk_squares(own[0], self._chunk))
        return norm_of_chunks(squares[: -(-self.count // self._chunk)])

    def _from_all(self, figures: Tensor) -> Tensor:
        """The figures of all ranks' slices in the order of the ranks, where a rank has only its own."""
        if not self.shard:
            return figures
        everyone = figures.new_empty(self.slices.world * figures.numel())
        all_gather_flat(everyone, figures, group=self._group)
        return everyone

    def own_parts(self, spans: Iterable[Range]) -> list[Tensor]:
        """Views of the values in those `spans` of the flat buffer that this rank's optimizer updates."""
        return [self.parts[number].data[start:stop] for number, start, stop in self.slices.within(spans)]

    @torch.no_grad()
    def gather_values(self) -> None:
        """Give every rank the values that the others have updated. Collective; nothing to do without `shard`."""
        if self.shard:
            buckets = [self._storage[slice(*bucket)] for bucket in self.slices.buckets]
            gather_in_place(buckets, [self._storage[slice(*own)] for own in self.slices.own], self._group)

    def _require_finite(self, lanes: list[float], norm: float, step: int) -> None:
        bad = self._header.bad_ranks(lanes)
        if bad is None and math.isfinite(norm):
            return
        first = self.first_non_finite(gradients=True) or "the loss"
        where = f"on rank {', '.join(map(str, bad))}" if bad else "in the sum over ranks"
        raise NumericError(f"step {step}: non-finite gradient {where}, first in {first}; nothing was updated")

    def first_non_finite(self, *, gradients: bool) -> str | None:
        """Name of the first parameter, in model order, with a value or gradient that is not finite; None if all are.

        Of gradients, those that this rank's optimizer reads are looked at, and all ranks' findings count. Collective
        with `shard`.
        """
        names = [name for name, _ in reversed(self.named)]
        of, shared = (self._reduced, self.shard) if gradients else (self._storage, False)
        spans = self.slices.own if shared else ((0, self.count),)
        found = next((number for number, name in enumerate(names) if self._bad_within(of, name, spans)), len(names))
        if shared:
            first = torch.tensor(found, device=of.device)
            dist.all_reduce(first, dist.ReduceOp.MIN, group=self._group)
            found = int(first)
        return names[found] if found < len(names) else None

    def _bad_within(self, of: Tensor, name: str, spans: Sequence[Range]) -> bool:
        start, stop = self.spans[name]
        parts = (of[max(start, first) : min(stop, last)] for first, last in spans if first < stop and last > start)
        return not all(bool(torch.isfinite(part).all()) for part in parts)
