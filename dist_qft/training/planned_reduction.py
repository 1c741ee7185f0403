"""The flat buffer of a run and its reduction, from counts alone: what `FlatParameters` holds and moves in a step."""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from dist_qft.config.schema import RunConfig
from dist_qft.training.fixed_tree import nodes_within
from dist_qft.training.norms import chunk_size
from dist_qft.training.optimizer import optimizer_bytes_per_rank, shards_optimizer
from dist_qft.training.slices import BLOCK, padded_slice
from dist_qft.training.step_header import StepHeader
from dist_qft.training.train_step import RANK_STATS
from dist_qft.tuned_model.preference import PREFERENCES


class _Subtrees(NamedTuple):
    """Numbers of subtrees of the fixed tree.

    Attributes:
        all: that the ranks have at the end of a step, together.
        own: of the rank with the most.
        copies: likewise, without a last micro-batch's that stands alone, which is summed where it is.
        held: that a rank has at most while a micro-batch is computed.
    """

    all: int
    own: int
    copies: int
    held: int


@cache
def _subtrees(accumulation: int, ranks: int) -> _Subtrees:
    """The subtrees of a step with so many micro-batches on each of so many ranks."""
    firsts = [rank * accumulation for rank in range(ranks)]
    of_ranks = [nodes_within(first, first + accumulation) for first in firsts]
    counts = [len(nodes) for nodes in of_ranks]
    copies = [len(nodes) - (nodes[-1].level == 0) for nodes in of_ranks]
    held = max(len(nodes_within(first, first + done)) for first in firsts for done in range(accumulation))
    return _Subtrees(sum(counts), max(counts), max(copies), held)


@dataclass(frozen=True)
class PlannedReduction:
    """The trainables of a run on `world_size` ranks, all of which have them.

    Args:
        trainable: parameters, with those of the task's own head.
        accumulation: micro-batches of each rank in a step.
    """

    config: RunConfig
    trainable: int
    world_size: int
    accumulation: int

    @property
    def spread(self) -> bool:
        """True if each rank updates its slices alone (`train.shard_optimizer`)."""
        return shards_optimizer(self.config.train, self.trainable, self.world_size)

    @property
    def _invariant(self) -> bool:
        return self.config.sharding.gradient_sum == "invariant"

    @property
    def _block(self) -> int:
        return chunk_size(self.trainable) if self._invariant else BLOCK

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the flat values, and of their gradients without the header: fp32, with padding if spread."""
        if not self.spread:
            return 4 * self.trainable
        return 4 * self.world_size * padded_slice(self.trainable, self.world_size, self._block)

    @property
    def header_bytes(self) -> int:
        """Bytes of the lanes on which all ranks must agree (`step_header`)."""
        task = self.config.task
        sums = 1 + len(PREFERENCES[task.name].names) if task.prefers else 0
        return 4 * StepHeader.lanes_needed(self.world_size, RANK_STATS, sums)

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of the moments that each rank keeps."""
        return optimizer_bytes_per_rank(self.config.train, self.trainable, self.world_size, self._block)

    @property
    def held_bytes(self) -> int:
        """Bytes beside the buffers while a micro-batch is computed, on the fullest rank: the sums of subtrees."""
        return self._leaf_bytes * _subtrees(self.accumulation, self.world_size).held if self._invariant else 0

    def received_bytes(self, device: str) -> int:
        """Bytes that have come from other ranks, on "cuda" or "cpu", when a step's last backward pass ends.

        On CPUs the parts of scattered buckets wait for the end of the step to be added up (`start_reduce_scatter`).
        """
        return self.buffer_bytes if self.spread and not self._invariant and device == "cpu" else 0

    @property
    def exchange_bytes(self) -> int:
        """Bytes beside the buffers while subtrees of other ranks are exchanged and added, on the fullest rank.

        First the sums of subtrees and the pieces of them to send; then what is sent and received; then what is
        received, and unless the optimizer is spread the whole sum.
        """
        if not self._invariant:
            return 0
        trees, shared = _subtrees(self.accumulation, self.world_size), 1 if self.spread else 0
        piece = 4 * (-(-(self._leaf_bytes // 4 - shared) // self.world_size) + shared)
        sent, received = self.world_size * trees.own * piece, trees.all * piece
        whole = 0 if self.spread else self.world_size * piece
        return max(trees.copies * self._leaf_bytes + sent, sent + received, received + whole)

    @property
    def _leaf_bytes(self) -> int:
        """Bytes of what a micro-batch adds to the tree: the gradients, and the header or, if spread, the loss."""
        return self.buffer_bytes + (4 if self.spread else self.header_bytes)

    def collectives(self) -> dict[str, int]:
        """Bytes of the tensors of a step's collectives over all ranks, by content; of an exchange the larger side.

        gradients: their sum over ranks, or each rank's slice of it. header: beside them, or at their end in one
        collective. norms: of each rank's slices. values: gathered after the update.
        """
        ranks, spread = self.world_size, self.spread
        found = {"gradients": self.buffer_bytes, "header": self.header_bytes}
        if spread:
            found |= {"norms": 8 * ranks, "values": self.buffer_bytes}
        if not self._invariant:
            return found
        sums = _subtrees(self.accumulation, ranks).all
        own = len(nodes_within(0, self.accumulation))
        exchanged = max(sums, own * ranks)  # subtree sums that a rank receives, or sends
        if spread:  # the loss, which rounds, goes with the gradients
            part = self.buffer_bytes // 4 // ranks
            squares = 8 * ranks * -(-part // self._block)
            loss = {"gradients": 4 * exchanged * (part + 1), "header": self.header_bytes - 4}
            return found | loss | {"norms": squares}
        part = -(-(self.buffer_bytes + self.header_bytes) // 4 // ranks)
        return {"gradients": 4 * part * (exchanged + ranks), "header": 0}
