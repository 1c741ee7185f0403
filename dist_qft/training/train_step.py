"""One optimizer step: micro-batches forward and backward, one reduction, one update."""

import math
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from dist_qft.config.schema import RunConfig, TrainConfig
from dist_qft.data.batches import MicroBatch
from dist_qft.errors import NumericError
from dist_qft.methods.forward import Forward
from dist_qft.ranks.device import order_required
from dist_qft.ranks.preemption import StopSignal
from dist_qft.training.compute_clock import ComputeClock
from dist_qft.training.fixed_tree import FixedTree
from dist_qft.training.flat_parameters import FlatParameters
from dist_qft.training.optimizer import (
    clip_gradient,
    learning_rate,
    make_optimizer,
    scaled_ranges,
    shards_optimizer,
    step_with_ranges,
)
from dist_qft.training.step_header import StepTotals
from dist_qft.tuned_model.assemble import Assembled

RANK_STATS = 2  # numbers of each rank that ride along with a step: MiB held, compute seconds


@dataclass(frozen=True)
class StepResult:
    """The outcome of a step, equal on all ranks except for the times.

    Attributes:
        loss: mean per term (target token, label, pair) over the global batch.
        tokens: targets.
        figures: of the task, by name.
        rank_stats: for each rank, MiB held and compute seconds.
        stop: some rank was asked to stop.
    """

    loss: float
    tokens: int
    grad_norm: float
    learning_rate: float
    stop: bool
    rank_stats: list[list[float]]
    compute_seconds: float
    reduce_seconds: float
    figures: dict[str, float] = field(default_factory=dict)


@dataclass
class TrainStep:
    """The parts that an optimizer step works on.

    Attributes:
        forward: the tuned model up to its last hidden states.
        parts: the task that turns these into a loss, and the engine under the base.
        flat: the trainables with their gradients.
        total_steps: of the run; the learning rate's curve ends there.
    """

    forward: Forward
    parts: Assembled
    flat: FlatParameters
    optimizer: torch.optim.Optimizer
    config: TrainConfig
    total_steps: int

    def __post_init__(self) -> None:
        self.clock = ComputeClock(self.flat.values.device)
        vectors = {name for name, parameter in self.flat.named if parameter.dim() < 2}
        ranges = scaled_ranges(self.config, self.flat.spans, vectors).items()
        self._scaled = [(part, rates) for rates, spans in ranges for part in self.flat.own_parts(spans)]

    def run(
        self,
        step: int,
        micro_batches: list[MicroBatch],
        *,
        check_digest: bool,
        stop: StopSignal | None = None,
        memory_mebibytes: float = 0.0,
    ) -> StepResult:
        """Run optimizer step `step` (0-based). Collective.

        Args:
            check_digest: also compare the replicas' values.
            stop: asked after the last backward pass, so that a signal during the step still ends the run after it.

        Raises:
            NumericError: on all ranks. A gradient or loss is not finite, or replicas differ: nothing was updated then.
                Or the update itself made a value non-finite.
        """
        started = time.perf_counter()
        self.clock.begin()
        with order_required():
            self._accumulate(step, micro_batches)
        self.clock.end()
        totals = self.flat.reduce(
            tokens=sum(batch.num_terms for batch in micro_batches),
            step=step + 1,
            check_digest=check_digest,
            stop=stop is not None and stop.requested,
            rank_stats=(memory_mebibytes, self.clock.told),
        )
        reduced = time.perf_counter()
        rate = self._update(step, totals.grad_norm)
        seconds = self.clock.seconds()
        return self._result(totals, rate, seconds, max(reduced - started - seconds, 0.0))

    def _accumulate(self, step: int, micro_batches: list[MicroBatch]) -> None:
        """Sum the gradients of this rank's micro-batches; the reduction starts during the last backward pass."""
        self.flat.begin_step()
        self.forward.begin_step(micro_batches)
        with self.parts.fixed():
            for number, batch in enumerate(micro_batches, 1):
                if number == len(micro_batches):
                    self.flat.reduce_during_backward()
                batch = batch.to(self.flat.values.device)
                # Dropout masks depend on the global micro-batch alone: the same on any world size, nothing to save.
                torch.manual_seed(_dropout_seed(self.config.seed, step, batch.index))
                found = self.parts.task.loss(self.forward(batch), batch)
                found.loss.backward()
                self.parts.engine.after_backward()
                self.flat.end_micro_batch(found.loss.detach(), found.sums)

    def _update(self, step: int, norm: float) -> float:
        """Clip and apply the reduced gradient, which has this norm; returns the learning rate."""
        values = self.flat.values
        clip_gradient(self.flat.parts, norm, self.config.max_grad_norm)
        rate = learning_rate(self.config, step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        step_with_ranges(self.optimizer, self._scaled)
        self.flat.gather_values()
        # The largest magnitude is NaN or infinite if any value is. No later gradient may come to show it.
        largest = torch.linalg.vector_norm(values.detach(), ord=math.inf)
        if not math.isfinite(float(largest)):
            name = self.flat.first_non_finite(gradients=False)
            raise NumericError(
                f"step {step + 1}: the update made values of {name} non-finite, with a learning rate of {rate:g}; "
                "the step is not saved"
            )
        return rate

    def _result(self, totals: StepTotals, rate: float, compute_seconds: float, reduce_seconds: float) -> StepResult:
        return StepResult(
            loss=totals.loss_sum / max(totals.tokens, 1),
            tokens=int(totals.sums[0]) if totals.sums else totals.tokens,
            grad_norm=totals.grad_norm,
            learning_rate=rate,
            stop=totals.stop,
            rank_stats=totals.rank_stats,
            compute_seconds=compute_seconds,
            reduce_seconds=reduce_seconds,
            figures=self.parts.task.figures(totals.sums, totals.tokens),
        )


def make_train_step(
    config: RunConfig,
    parts: Assembled,
    forward: Forward,
    *,
    accumulation: int,
    total_steps: int,
    group: dist.ProcessGroup | None = None,
) -> TrainStep:
    """The step of a run: its trainables in a flat buffer, and the optimizer over them. Collective.

    Args:
        accumulation: micro-batches of each rank in a step.
        group: of the gradients' reduction.
    """
    named = parts.named_tensors()
    invariant = config.sharding.gradient_sum == "invariant"
    flat = FlatParameters(
        named,
        bucket_bytes=int(config.sharding.bucket_megabytes * 2**20),
        group=group,
        rank_stats_size=RANK_STATS,
        sums_size=parts.task.sums,
        tree=FixedTree(accumulation, group) if invariant else None,
        shard=shards_optimizer(config.train, sum(each.numel() for _, each in named), dist.get_world_size(group)),
    )
    optimizer = make_optimizer(config.train, flat.parts, flat.count)
    return TrainStep(forward, parts, flat, optimizer, config.train, total_steps)


def _dropout_seed(seed: int, step: int, micro_batch: int) -> int:
    return ((seed * 1_000_003 + step) * 1_000_003 + micro_batch) % 2**63
