"""The flat buffer of a run and its reduction, from counts alone: what `FlatParameters` holds and moves in a step."""

from dataclasses import dataclass

from dist_qft.config.schema import RunConfig
from dist_qft.training.fixed_tree import nodes_within
from dist_qft.training.norms import chunk_size
from dist_qft.training.optimizer import optimizer_bytes_per_rank, shards_optimizer
from dist_qft.training.slices import BLOCK, padded_slice
from dist_qft.training.step_header import StepHeader
from dist_qft.training.train_step import RANK_STATS
from dist_qft.tuned_model.preference import PREFERENCES


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
        firsts = [rank * self.accumulation for rank in range(ranks)]
        sums = sum(len(nodes_within(first, first + self.accumulation)) for first in firsts)
        own = len(nodes_within(0, self.accumulation))
        exchanged = max(sums, own * ranks)  # subtree sums that a rank receives, or sends
        if spread:  # the loss, which rounds, goes with the gradients
            part = self.buffer_bytes // 4 // ranks
            squares = 8 * ranks * -(-part // self._block)
            loss = {"gradients": 4 * exchanged * (part + 1), "header": self.header_bytes - 4}
            return found | loss | {"norms": squares}
        part = -(-(self.buffer_bytes + self.header_bytes) // 4 // ranks)
        return {"gradients": 4 * part * (exchanged + ranks), "header": 0}
