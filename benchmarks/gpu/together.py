"""The parts that all ranks do together in one group of processes; `several.py` starts them."""

import importlib.util
import os
import sys
import time
from collections.abc import Callable

import steps
import torch
import torch.distributed as dist
from kernels import environment
from parts import Figures, Options, options, run_parts

from dist_qft.plan import make_plan
from dist_qft.ranks.connection import connect
from dist_qft.ranks.world import World
from tests.support.collectives import recorded_collectives
from tests.support.engine_bytes import round_trip

_CLOSE = (0.01, 0.05)  # shares by which losses and gradients' norms may differ between engines


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


def engines() -> tuple[str, ...]:
    """The engines that can be used here: zero only with DeepSpeed."""
    zero = importlib.util.find_spec("deepspeed") is not None
    return ("replicated", "fsdp", "zero") if zero else ("replicated", "fsdp")


def step_on(engine: str) -> Callable[[Options], Figures]:
    """The part that measures qahira's step with the base held by an engine: tokens of all ranks, memory."""

    def part(asked: Options) -> Figures:
        if engine not in engines():
            return {"skipped": "deepspeed is not installed"}
        length = 128 if asked.quick else 4096
        with steps.run_config("qahira", asked.quick, sharding={"engine": engine}) as config:
            return steps.measured(steps.training_step(config, length, asked.device), length * asked.ranks, asked)

    return part


def bytes_in_gathers(asked: Options) -> Figures:
    """Tensors of every dtype and of odd sizes: the bytes that were stored come back from gathers of both kinds."""
    return {engine: f"{round_trip(engine, asked.device)['total']} bytes" for engine in ("replicated", "fsdp")}


def engines_agree(asked: Options) -> Figures:
    """Losses of ten steps under every engine; what they gather beside the plan's, and one all-reduce per bucket."""
    found, first = Figures(), None
    length, layers, count = (128, 2, 3) if asked.quick else (2048, 4, 10)
    for engine in engines():
        sharding = {"engine": engine, "bucket_megabytes": 0.02 if asked.quick else 25.0}
        train = {"global_batch_size": asked.ranks, "per_device_train_batch_size": 1, "learning_rate": 1e-2}
        with steps.run_config("qahira", asked.quick, layers=layers, sharding=sharding, train=train) as config:
            training, batch, _ = steps.prepared(config, length, asked.device)
            planned = make_plan(config, asked.ranks).gather_bytes_per_micro_batch
        traffic, losses, norms = training.parts.engine.traffic, [], []
        for number in range(count):
            before = traffic.gathered_bytes
            with recorded_collectives() as log:
                result = training.run(number, [batch], check_digest=False)
            losses.append(result.loss)
            norms.append(result.grad_norm)
            gathered = traffic.gathered_bytes - before
        reductions = sum(name == "allreduce" for _, name, _ in log)
        buckets = len(training.flat.slices.buckets)
        found[f"{engine}: first and last loss"] = [losses[0], losses[-1]]
        found[f"{engine}: bytes gathered, planned"] = [gathered, planned]
        found[f"{engine}: all-reduces, buckets"] = [reductions, buckets]
        first = first or (losses, norms)
        for mine, its, close in zip((losses, norms), first, _CLOSE, strict=True):
            near = all(abs(a - b) <= close * b for a, b in zip(mine, its, strict=True))
            if not near or mine[-1] == mine[0]:
                raise AssertionError(f"{engine}: {mine}, under {engines()[0]} {its}")
        if gathered != planned or reductions != buckets or buckets < 2:
            raise AssertionError(f"{engine}: {found}")
    return found


def overlap(asked: Options) -> Figures:
    """Shares of a step in which the GPU does nothing but gather the base, or but add gradients."""
    if asked.device.type == "cpu":
        return {"skipped": "only on GPUs: the profiler sees no kernels of gloo's collectives"}
    with steps.run_config("qahira", asked.quick, sharding={"engine": "fsdp"}) as config:
        training, batch, base = steps.prepared(config, 128 if asked.quick else 4096, asked.device)
    for number in range(2):
        training.run(number, [batch], check_digest=False)
    spans, wall = steps.profiled(lambda: training.run(2, [batch], check_digest=False), asked.device)
    gathers = [span for span in spans if "AllGather" in span[2]]
    forward = len(base.units.tables) + len(base.units.layers) + 1
    if len(gathers) <= forward:
        raise AssertionError(
            f"{len(gathers)} gathers, {forward} of them in the forward pass: {sorted({s[2] for s in spans})}"
        )
    computing = [span for span in spans if "nccl" not in span[2]]
    parts = {"gathers, forward": gathers[:forward], "gathers, backward": gathers[forward:]}
    parts["sums of gradients"] = [span for span in spans if "AllReduce" in span[2]]
    return {f"{name}: share": steps.alone_microseconds(part, computing) / wall for name, part in parts.items()}


PARTS = {
    "environment": environment,
    "bandwidth between the ranks": bandwidth,
    "bytes in gathers": bytes_in_gathers,
    "engines agree": engines_agree,
    **{f"qahira, {engine}": step_on(engine) for engine in ("replicated", "fsdp", "zero")},
    "communication that nothing hides": overlap,
}


if __name__ == "__main__":
    world = World.from_environment()
    given = options(int(os.environ["LOCAL_RANK"]))
    with connect(world, given.device, 600):
        if run_parts(given, PARTS, together=True, writes=world.rank == 0):
            sys.stderr.flush()
            os._exit(1)  # NCCL would end the group together with ranks that wait within the part for this one
