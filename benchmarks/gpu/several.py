"""The parts for several GPUs; `benchmarks/gpu.sh --ranks N` starts one process for each."""

import os
import sys
import time
from collections.abc import Callable

import steps
import torch
import torch.distributed as dist
from kernels import environment
from parts import Figures, Options, options, run_parts

from dist_qft.ranks.connection import connect
from dist_qft.ranks.world import World


def bandwidth(asked: Options) -> Figures:
    """GB/s that a rank receives in an all-gather of a layer's bytes, and reduces in an all-reduce of a bucket."""
    found: Figures = {}
    size, world = (1 << 16 if asked.quick else 1 << 27) // asked.ranks, asked.ranks
    part = torch.zeros(size, dtype=torch.uint8, device=asked.device)
    whole = torch.zeros(size * world, dtype=torch.uint8, device=asked.device)
    bucket = torch.zeros(size, device=asked.device)
    gather = lambda: dist.all_gather(list(whole.chunk(world)), part)  # noqa: E731
    for name, operation, received in (
        ("all-gather, GB/s", gather, size * (world - 1)),
        ("all-reduce, GB/s", lambda: dist.all_reduce(bucket), 2 * bucket.nbytes * (world - 1) / world),
    ):
        operation()
        seconds = _seconds(operation, asked.device, 5)
        found[name] = received / seconds / 1e9
    return found


def _seconds(operation: Callable[[], object], device: torch.device, times: int) -> float:
    _wait(device)
    dist.barrier()
    started = time.perf_counter()
    for _ in range(times):
        operation()
    _wait(device)
    return (time.perf_counter() - started) / times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def step_on(engine: str) -> Callable[[Options], Figures]:
    """The part that measures qahira's step with the base held by an engine: tokens of all ranks, losses, memory."""

    def part(asked: Options) -> Figures:
        length = 128 if asked.quick else 4096
        with steps.run_config("qahira", asked.quick, sharding={"engine": engine}) as config:
            step = steps.training_step(config, length, asked.device)
            losses = [step(number).loss for number in range(3)]
            found = steps.measured(lambda number: step(3 + number), length * asked.ranks, asked)
        return found | {"losses of the first steps": [round(loss, 4) for loss in losses]}

    return part


PARTS = {
    "environment": environment,
    "bandwidth between the ranks": bandwidth,
    "qahira, replicated": step_on("replicated"),
    "qahira, fsdp": step_on("fsdp"),
}


if __name__ == "__main__":
    world = World.from_environment()
    given = options(int(os.environ["LOCAL_RANK"]))
    with connect(world, given.device, 600):
        code = run_parts(given, PARTS, writes=world.rank == 0)
    sys.exit(code)
