"""Measure a training step from outside: time, bytes gathered and reduced, memory; and the totals of all steps."""

import time
from dataclasses import dataclass

import psutil
import torch

from dist_qft.ranks.collectives import maximum
from dist_qft.ranks.process import resident_peak
from dist_qft.sharding.engine import Engine
from dist_qft.training.flat_parameters import FlatParameters
from dist_qft.training.train_step import StepResult


@dataclass(frozen=True)
class StepCosts:
    """The costs of one step on this rank; times in seconds."""

    seconds: float
    data_seconds: float
    gather_seconds: float
    gathered_bytes: int
    reduced_bytes: int


class StepMeter:
    """The counters of this process's steps.

    Attributes:
        steps, tokens: done so far; tokens are targets over all ranks.
    """

    def __init__(self, engine: Engine, flat: FlatParameters) -> None:
        self.steps = self.tokens = 0
        self._traffic, self._flat = engine.traffic, flat
        self._seconds, self._first_seconds, self._gathered_bytes = 0.0, 0.0, 0
        self._begin = self._data_ready = 0.0
        self._before = (0, 0.0, 0)

    def begin(self) -> None:
        """Start the clock of a step, before its micro-batches are made."""
        self._before = (self._traffic.gathered_bytes, self._traffic.seconds, self._flat.reduced_bytes)
        self._begin = time.perf_counter()

    def data_is_ready(self) -> None:
        """Note the time at which the step's micro-batches are made."""
        self._data_ready = time.perf_counter()

    def end(self, tokens: int) -> StepCosts:
        """End a step of so many target tokens and return its costs."""
        gathered, gather_seconds, reduced = self._before
        costs = StepCosts(
            seconds=time.perf_counter() - self._begin,
            data_seconds=self._data_ready - self._begin,
            gather_seconds=self._traffic.seconds - gather_seconds,
            gathered_bytes=self._traffic.gathered_bytes - gathered,
            reduced_bytes=self._flat.reduced_bytes - reduced,
        )
        if self.steps == 0:
            self._first_seconds = costs.seconds
        self.steps += 1
        self.tokens += tokens
        self._seconds += costs.seconds
        self._gathered_bytes += costs.gathered_bytes
        return costs

    @property
    def tokens_per_second(self) -> float | None:
        """Target tokens per second over all steps; None if there was none."""
        return self.tokens / self._seconds if self.steps else None

    @property
    def seconds_per_step(self) -> float | None:
        """Mean over all steps but the first, which pays for what is set up once; None if there was none."""
        if self.steps < 2:
            return self._seconds if self.steps else None
        return (self._seconds - self._first_seconds) / (self.steps - 1)

    @property
    def gathered_bytes_per_step(self) -> int | None:
        """Bytes of the base that this rank received per step; None if there was no step."""
        return self._gathered_bytes // self.steps if self.steps else None

    @property
    def reduced_bytes_per_step(self) -> int | None:
        """Bytes of gradients that were reduced per step; None if there was no step."""
        return self._flat.reduced_bytes // self.steps if self.steps else None


def step_scalars(result: StepResult, costs: StepCosts, epoch: float, check_digest: bool) -> dict[str, float]:
    """The figures of one step under the names that TensorBoard and `metrics.jsonl` show."""
    compute = [seconds for _, seconds in result.rank_stats]
    return {
        "train/loss": result.loss,
        **{f"train/{name}": value for name, value in result.figures.items()},
        "train/learning_rate": result.learning_rate,
        "train/grad_norm": result.grad_norm,
        "train/epoch": epoch,
        "train/target_tokens": result.tokens,
        "train/target_tokens_per_second": result.tokens / costs.seconds,
        "time/compute(s)": result.compute_seconds,
        "time/reduce(s)": result.reduce_seconds,
        "time/straggler_gap(s)": max(compute) - min(compute),
        **{f"memory/rank{rank}(MiB)": memory for rank, (memory, _) in enumerate(result.rank_stats)},
        "traffic/gathered_bytes": costs.gathered_bytes,
        "traffic/reduced_bytes": costs.reduced_bytes,
        "time/gather(s)": costs.gather_seconds,
        "time/data(s)": costs.data_seconds,
        "time/step(s)": costs.seconds,
        "replicas/digest_checked": float(check_digest),
    }


def held_bytes(device: torch.device) -> int:
    """Bytes held on the device now, or by the process where the device is the CPU.

    On CUDA all memory in use counts, with the allocations of NCCL, cuBLAS and bitsandbytes beside PyTorch's, and with
    freed memory that PyTorch keeps. So at the end of a step it is close to the step's peak.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    return psutil.Process().memory_info().rss


def peak_bytes(device: torch.device) -> tuple[int, int | None]:
    """Peak of a process's resident memory and of a device's, each of the rank with the most. Collective.

    The second is None on CPUs.
    """
    resident = maximum(resident_peak(), device)
    on_device = maximum(held_bytes(device) if device.type == "cuda" else 0, device)
    return int(resident), int(on_device) if device.type == "cuda" else None
