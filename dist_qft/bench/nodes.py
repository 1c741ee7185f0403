"""`bench nodes`: a training step on two emulated nodes of two ranks, the base sharded over all ranks or in each node.

The nodes are network namespaces of this machine; the link between them has the speed of a data centre's, of an office's
and of a slow one. Beside ours PEFT under FSDP1, sharding over all ranks (FULL_SHARD) and in each node (HYBRID_SHARD).
With --json, sides that are measured are kept in a file beside it, and the same command goes on after an interruption.
"""

from functools import partial
from typing import Any

from dist_qft.bench.kept_sides import KeptSides
from dist_qft.bench.models import dense_folder
from dist_qft.bench.network import Network, can_be_two_nodes
from dist_qft.bench.options import Options
from dist_qft.bench.processes import run_side
from dist_qft.bench.report import Comparison, Report, Side, compare

RANKS_PER_NODE = 2
MEGABITS = (10_000, 1_000, 200)
GROUPED = "qlora, group node"
# Side -> the worker's benchmark and what it is told; that which shards in each node behind that which does not.
SIDES: dict[str, tuple[str, dict[str, Any]]] = {
    "qlora, group world": ("ours", {"method": "qlora", "engine": "fsdp"}),
    GROUPED: ("ours", {"method": "qlora", "engine": "fsdp", "group": RANKS_PER_NODE}),
    "PEFT, FSDP1 FULL_SHARD": ("peer", {"peer": "fsdp1"}),
    "PEFT, FSDP1 HYBRID_SHARD": ("peer", {"peer": "fsdp1", "group": RANKS_PER_NODE}),
}
_METRICS = ("tokens_per_second", "seconds", "link_bytes")


def run(options: Options) -> Report:
    """Every side on every link."""
    ranks = 2 * RANKS_PER_NODE
    settings = options.common(ranks) | {
        "model": str(dense_folder(options.model)),
        "rows": 1,
        "length": 32,
        "accumulation": 1,
        "steps": options.steps,
        "rank": 16,
    }
    if not can_be_two_nodes() or options.device != "cpu":
        why = "this machine cannot emulate two nodes (user and network namespaces, ip, tc, nsenter), or not for GPUs"
        return Report("nodes", settings | {"ranks": ranks}, [], [], [f"not run: {why}"])
    sides: dict[str, Side] = {}
    comparisons: list[Comparison] = []
    names = [GROUPED] if options.quick else list(SIDES)
    links = MEGABITS[1:2] if options.quick else MEGABITS
    kept = KeptSides(options.kept, "nodes", len(names) * len(links))
    for megabits in links:
        for name in names:
            kind, told = SIDES[name]
            label = f"{name}, {megabits} Mbit/s"
            told_all, network = settings | told, Network(2, megabits)
            run_it = partial(run_side, label, kind, told_all, ranks=ranks, network=network)
            sides[label] = _with_link_bytes(kept.measure(label, told_all, run_it))
        for whole, grouped in zip(names[::2], names[1::2], strict=False):
            ours, peer = (f"{name}, {megabits} Mbit/s" for name in (grouped, whole))
            comparisons += [compare(sides, metric, ours, peer) for metric in _METRICS]
        # Sharded in each node, a ring over all ranks takes the gradients over the link, and nothing else crosses it.
        own = f"{GROUPED}, {megabits} Mbit/s"
        bound = 2 * (ranks - 1) / ranks * sides[own].metrics.get("reduced_bytes", 0.0)
        comparisons.append(compare(sides, "link_bytes", own, None, bound))
    notes = [
        f"two namespaces with {RANKS_PER_NODE} ranks each on the cores of this machine; link MB: sent by the first node"
        " in a step; ratios are of sharding in each node over sharding over all ranks"
    ]
    return Report("nodes", settings | {"ranks": ranks}, list(sides.values()), comparisons, notes)


def _with_link_bytes(side: Side) -> Side:
    """The side's figures with the counter called what it counts here; bounds of one shared interface left out."""
    metrics = dict(side.metrics)
    if "wire_bytes" in metrics:
        metrics["link_bytes"] = metrics.pop("wire_bytes")
    for name in ("counted_bytes", "bound_bytes"):
        metrics.pop(name, None)
    return Side(side.name, metrics, side.error)
