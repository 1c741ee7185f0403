"""One optimizer step: micro-batches forward and backward, one reduction, one update."""

import time
from dataclasses import dataclass

import torch

from dist_qft.config.schema import TrainConfig
from dist_qft.data.batches import MicroBatch
from dist_qft.methods.forward import Forward
from dist_qft.ranks.preemption import StopSignal
from dist_qft.sharding.engine import Engine
from dist_qft.training.flat_parameters import FlatParameters
from dist_qft.training.optimizer import clip_gradient, learning_rate
from dist_qft.tuned_model.task import Task


@dataclass(frozen=True)
class StepResult:
    """What a step did; equal on all ranks but for the times.

    `loss` is the mean per target token over the global batch; `rank_stats[rank]` is (MiB held, compute seconds).
    """

    loss: float
    tokens: int
    grad_norm: float
    learning_rate: float
    stop: bool
    rank_stats: list[list[float]]
    compute_seconds: float
    reduce_seconds: float


RANK_STATS = 2


def train_step(
    forward: Forward,
    task: Task,
    engine: Engine,
    flat: FlatParameters,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    micro_batches: list[MicroBatch],
    *,
    step: int,
    total_steps: int,
    check_digest: bool,
    stop: StopSignal,
    memory_mebibytes: float,
) -> StepResult:
    """Run optimizer step `step` (0-based). Collective; raises NumericError before anything is updated."""
    device = flat.values.device
    started = time.perf_counter()
    flat.begin_step()
    forward.begin_step(micro_batches)
    for batch in micro_batches:
        if batch is micro_batches[-1]:
            flat.reduce_during_backward()
        # Dropout masks depend on the global micro-batch alone: the same on any world size, nothing to save.
        torch.manual_seed(_dropout_seed(config.seed, step, batch.index))
        loss, _ = task.loss(forward(batch), batch)
        loss.backward()
        engine.after_backward()
        flat.end_micro_batch(loss.detach())
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # kernels are only launched so far: their time is not the reduction's
    computed = time.perf_counter()
    totals = flat.reduce(
        tokens=sum(batch.num_targets for batch in micro_batches),
        step=step + 1,
        check_digest=check_digest,
        stop=stop.requested,
        rank_stats=(memory_mebibytes, computed - started),
    )
    reduced = time.perf_counter()
    norm = clip_gradient(flat.values, config.max_grad_norm)
    rate = learning_rate(config, step, total_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return StepResult(
        loss=totals.loss_sum / max(totals.tokens, 1),
        tokens=totals.tokens,
        grad_norm=float(norm),
        learning_rate=rate,
        stop=totals.stop,
        rank_stats=totals.rank_stats,
        compute_seconds=computed - started,
        reduce_seconds=reduced - computed,
    )


def _dropout_seed(seed: int, step: int, micro_batch: int) -> int:
    return ((seed * 1_000_003 + step) * 1_000_003 + micro_batch) % 2**63
