"""`bench all-reduce`: reducing the gradients of one step, ours beside DDP, on the same tensors.

The loss is the sum of all parameters, so that little but the reduction takes time. With and without accumulation, on
the machine's own loopback and, where it can be slowed down, on a link of 200 Mbit/s. With both of our reductions.
"""

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dist_qft.bench.measuring import Memory, measure_steps
from dist_qft.bench.network import Network, can_slow_down
from dist_qft.bench.options import Options
from dist_qft.bench.processes import TIMEOUT_SECONDS, run_side
from dist_qft.bench.report import Comparison, Report, compare
from dist_qft.ranks.groups import new_group
from dist_qft.training.fixed_tree import FixedTree
from dist_qft.training.flat_parameters import FlatParameters

BUCKET_MEGABYTES = 25  # DDP's default, and ours
SLOW_MEGABITS = 200
# Side -> the worker's benchmark, and whether with the invariant reduction; the peer last.
SIDES = {"ours": ("reduce-ours", False), "ours, invariant": ("reduce-ours", True), "DDP": ("reduce-peer", False)}


def run(options: Options) -> Report:
    """Rank-16 LoRAs of SmolLM2's 210 linear layers, 5 M numbers, in steps of 1 and 4 micro-batches."""
    settings = options.common()
    settings |= {"layers": 10 if options.quick else 210, "steps": options.steps}
    links = {"loopback": None} | ({"slow link": SLOW_MEGABITS} if can_slow_down() and options.device == "cpu" else {})
    links = dict(list(links.items())[-1:]) if options.quick else links
    sides: dict[str, Any] = {}
    comparisons: list[Comparison] = []
    for link, megabits in links.items():
        for count in (4,) if options.quick else (1, 4):
            names = [f"{side}, {link}, {count} micro-batches" for side in SIDES]
            for name, (kind, invariant) in zip(names, SIDES.values(), strict=True):
                wanted = settings | {"accumulation": count, "invariant": invariant}
                sides[name] = run_side(name, kind, wanted, ranks=options.ranks, network=Network(1, megabits))
            *own, ddp = names
            for name in own:
                comparisons.append(compare(sides, "seconds", name, ddp))
                comparisons.append(compare(sides, "wire_bytes", name, ddp, sides[name].metrics.get("bound_bytes")))
    notes = [] if "slow link" in links else ["no slow link: this machine does not let us slow its network down"]
    if "slow link" in links:
        notes.append(f"slow link: {SLOW_MEGABITS} Mbit/s, shared by both directions (tc, token bucket)")
    return Report("all-reduce", settings | {"ranks": options.ranks}, list(sides.values()), comparisons, notes)


def ours(settings: dict[str, Any]) -> dict[str, float]:
    """Our flat buffer, reduced once per step."""
    device = torch.device(settings["device"])
    model, memory = _parameters(settings, device), Memory(device)
    named = list(model.named_parameters())
    group = new_group(device, TIMEOUT_SECONDS)
    tree = FixedTree(settings["accumulation"], group) if settings["invariant"] else None
    flat = FlatParameters(named, bucket_bytes=BUCKET_MEGABYTES * 2**20, group=group, tree=tree)

    def step(number: int) -> None:
        flat.begin_step()
        for index in range(settings["accumulation"]):
            if index == settings["accumulation"] - 1:
                flat.reduce_during_backward()
            loss = model()
            loss.backward()
            flat.end_micro_batch(loss.detach())
        flat.reduce(tokens=1, step=number)

    bound = 2 * (dist.get_world_size() - 1) * 4 * flat.count
    return measure_steps(step, settings["steps"], memory, device) | {"bound_bytes": bound}


def peer(settings: dict[str, Any]) -> dict[str, float]:
    """DDP at its best: no reduction but in the last micro-batch, gradients as views of its buckets."""
    device = torch.device(settings["device"])
    model, memory = _parameters(settings, device), Memory(device)
    wrapped = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=BUCKET_MEGABYTES, gradient_as_bucket_view=True)

    def step(number: int) -> None:
        wrapped.zero_grad(set_to_none=False)
        for index in range(settings["accumulation"]):
            with nullcontext() if index == settings["accumulation"] - 1 else wrapped.no_sync():
                wrapped().backward()

    return measure_steps(step, settings["steps"], memory, device)


class _Parameters(nn.Module):
    """LoRA pairs without a model."""

    def __init__(self, layers: int, device: torch.device) -> None:
        super().__init__()
        shapes = [shape for _ in range(layers) for shape in ((16, 576), (864, 16))]
        self.tensors = nn.ParameterList([torch.zeros(shape, device=device) for shape in shapes])

    def forward(self) -> torch.Tensor:
        return sum(tensor.sum() for tensor in self.tensors)


def _parameters(settings: dict[str, Any], device: torch.device) -> nn.Module:
    return _Parameters(settings["layers"], device)
