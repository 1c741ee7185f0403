"""Readings of time, memory and bytes on the wire, for every side alike. Linux only: the kernel keeps the counters."""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_LAUNCHED, _KEPT_BUSY = 20, 8192  # calls; rows and columns of a product that takes milliseconds
_RESET_PEAK = "5"  # proc(5): the peak resident size becomes the present one


class Memory:
    """Memory of this process above what it was when the object was made, in bytes.

    On a CPU it is the resident size, mapped file pages included, whose peak the kernel keeps; on CUDA the bytes that
    torch has allocated. Make it after the side's imports: the packages' own memory is not compared.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.restart()
        self._start = self._read("VmRSS")

    def restart(self) -> None:
        """Forget the peak so far."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            _CLEAR_REFS.write_text(_RESET_PEAK)

    @property
    def peak(self) -> int:
        """Largest number of bytes held since the last restart."""
        return self._read("VmHWM") - self._start

    @property
    def held(self) -> int:
        """Bytes held now."""
        return self._read("VmRSS") - self._start

    def _read(self, field: str) -> int:
        if self._device.type == "cuda":
            peak = field == "VmHWM"
            return (torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated)(self._device)
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024


def wire_bytes() -> int:
    """Bytes sent so far through the interface of the ranks of this machine or emulated node, headers included."""
    return psutil.net_io_counters(pernic=True)[os.environ.get("GLOO_SOCKET_IFNAME", "lo")].bytes_sent


def measure_steps(step: Callable[[int], object], steps: int, memory: Memory, device: torch.device) -> dict[str, float]:
    """Median seconds and wire bytes of `steps` calls after two to warm up, and the peak of memory while they ran.

    `cpu_seconds` is the CPU time of the process's threads in a step: on a busy machine it says more than `seconds`.
    Collective: all ranks begin and end each step together, so the interface's counter belongs to it.
    """
    for index in range(2):
        step(index)
    before_steps = memory.peak
    memory.restart()
    seconds, cpu, wire = [], [], []
    for index in range(steps):
        dist.barrier()
        sent, computed, started = wire_bytes(), time.process_time(), time.perf_counter()
        step(2 + index)
        synchronize(device)
        cpu.append(time.process_time() - computed)
        dist.barrier()
        seconds.append(time.perf_counter() - started)
        wire.append(wire_bytes() - sent)
    peak = memory.peak
    return {
        "seconds": statistics.median(seconds),
        "cpu_seconds": statistics.median(cpu),
        "wire_bytes": statistics.median(wire),
        "training_peak_bytes": peak,
        "peak_bytes": max(peak, before_steps),
    }


def share_of_ceiling(settings: Mapping[str, Any], seconds: float, device: torch.device) -> float:
    """Time that the frozen weights' products of a step would take at the ceiling of `matmul_flops`, over `seconds`.

    A step multiplies each token with each weight forwards and, for the gradient of its input, backwards. Collective.

    Args:
        settings: of the side; has `product_weights`, `rows`, `length`, `accumulation` and `precision`.
    """
    tokens = settings["rows"] * settings["length"]
    flops = 4 * settings["product_weights"] * tokens * settings["accumulation"]
    return flops / matmul_flops(device, getattr(torch, settings["precision"]), tokens) / seconds


def matmul_flops(device: torch.device, dtype: torch.dtype, rows: int) -> float:
    """Multiplications and additions per second of the best of ten products (rows, 1024) x (1024, 1024). Collective.

    All ranks multiply at the same time, as they do in a step.
    """
    left, right = torch.randn(rows, 1024, device=device).to(dtype), torch.randn(1024, 1024, device=device).to(dtype)
    left @ right
    dist.barrier()
    return 2 * rows * 1024**2 / min(_once(lambda: left @ right, device) for _ in range(10))


def median_seconds(function: Callable[[], object], device: torch.device, *, at_least: float = 0.3) -> float:
    """Median seconds of one call, over at least five readings and `at_least` seconds.

    On a GPU by CUDA events, and without the time that the host takes to launch the call: see `_launched_ahead`.
    """
    function()
    found: list[float] = []
    read = _once if device.type != "cuda" else _launched_ahead
    began = time.perf_counter()
    while len(found) < 5 or time.perf_counter() - began < at_least:
        found.append(read(function, device))
    return statistics.median(found)


def alternating_seconds(
    functions: dict[str, Callable[[], object]], device: torch.device, rounds: int
) -> dict[str, float]:
    """Median seconds of one call of each function, the functions taking turns: a busy machine disturbs all alike."""
    for function in functions.values():
        function()
    found: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            found[name].append(_once(function, device))
    return {name: statistics.median(times) for name, times in found.items()}


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _once(function: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        function()
        return time.perf_counter() - started
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1000


def _launched_ahead(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one of `_LAUNCHED` calls that a GPU does without a gap: it is given something to do meanwhile.

    A kernel of a few dozen microseconds takes the host as long to launch. In a training step the host is ahead.
    """
    side = torch.empty(_KEPT_BUSY, _KEPT_BUSY, dtype=torch.bfloat16, device=device).fill_(1.0)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    side @ side
    start.record()
    for _ in range(_LAUNCHED):
        function()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1000 / _LAUNCHED
