"""`bench step`: one optimizer step on several ranks, ours on every engine beside PEFT under DDP, FSDP and ZeRO-3.

All sides train rank-16 adapters on every linear layer of the same dense folder, quantized to NF4 with blocks of 64
when it is loaded (QA-HiRA: to affine4, the format it exists for), in the same compute dtype, on the same tokens.
The share of the ceiling says how much of a step the products of the base would take at the speed of a plain product.
"""

from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dist_qft.base_model.skeleton import build_skeleton
from dist_qft.bench.batches import micro_batch, random_ids
from dist_qft.bench.measuring import Memory, measure_steps, share_of_ceiling
from dist_qft.bench.models import dense_folder, product_weights
from dist_qft.bench.network import isolated
from dist_qft.bench.options import Options
from dist_qft.bench.processes import run_side
from dist_qft.bench.report import Comparison, Report, Side, compare
from dist_qft.config.schema import RunConfig
from dist_qft.methods.forward import BaseForward
from dist_qft.methods.specs import make_spec
from dist_qft.ranks.device import compute_dtype
from dist_qft.ranks.groups import new_group
from dist_qft.sharding.engines import make_engine
from dist_qft.training.train_step import TrainStep, make_train_step
from dist_qft.tuned_model.assemble import assemble

METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "qlora": {"method": {"name": "qlora"}, "quantization": {"linear": "nf4", "block": [64]}},
    "qbara": {"method": {"name": "qbara"}, "quantization": {"linear": "nf4", "block": [64]}},
    "qahira": {
        "method": {"name": "qahira", "pool": 32, "repeat": 1},
        "quantization": {"linear": "affine4", "block": [1, 32]},
    },
    "qablora": {
        "method": {"name": "qablora", "pool": 4, "repeat": 8},
        "quantization": {"linear": "affine4", "block": [8, 4]},
    },
    "qalora": {"method": {"name": "qalora", "pool": 32}, "quantization": {"linear": "affine4", "block": [1, 32]}},
}
MEASURED = ["qlora", "qbara", "qahira"]
ENGINES: tuple[str, ...] = ("fsdp", "zero", "replicated")
PEERS = {
    "ddp": "PEFT, DDP",
    "fsdp1": "PEFT, FSDP1",
    "fsdp2": "PEFT, accelerate FSDP2",
    "zero3": "PEFT, DeepSpeed ZeRO-3",
}
SHARDING_PEERS = ("fsdp1", "fsdp2", "zero3")


def run(options: Options) -> Report:
    """All sides on the main model, and on the larger one those that a user would choose between."""
    rows, length = (1, 32) if options.quick else (2, 128)
    settings = _settings(options, options.model, rows, length)
    methods, engines, peers = MEASURED, ENGINES, list(PEERS)
    if options.quick:
        methods, engines, peers = ["qlora"], ("fsdp",), ["ddp", "fsdp1"]
    sides = _all_sides(settings, options, methods, engines, peers)
    comparisons = _compared(sides, methods, engines)
    if not options.quick:
        large = _settings(options, "llama-1b", 1, 128)
        more = _all_sides(large, options, ["qlora"], ("fsdp",), ["ddp", "fsdp1", "zero3"], prefix="1B ")
        comparisons += _compared(more, ["qlora"], ("fsdp",), prefix="1B ")
        sides |= more
    where = "interface of their own" if isolated() else "interface of the machine, with all else on it"
    notes = [
        f"wire MB: sent by all ranks per step through a loopback {where}; bound: see dist_qft.bench.step.wire_bound"
    ]
    return Report("step", settings | {"ranks": options.ranks}, list(sides.values()), comparisons, notes)


def _settings(options: Options, model: str, rows: int, length: int) -> dict[str, Any]:
    common = options.common()
    size = {"rows": rows, "length": length, "accumulation": 1, "steps": options.steps, "rank": 16}
    folder = dense_folder(model)
    return common | size | {"model": str(folder), "product_weights": product_weights(folder)}


def _all_sides(
    settings: dict[str, Any],
    options: Options,
    methods: list[str],
    engines: tuple[str, ...],
    peers: list[str],
    prefix: str = "",
) -> dict[str, Side]:
    """Run our sides and the peers' in turn, so that a busy machine disturbs both."""
    ours = [("ours", f"{m}, {e}", {"method": m, "engine": e}) for m in methods for e in engines]
    theirs = [("peer", PEERS[peer], {"peer": peer}) for peer in peers]
    sides = {}
    for pair in zip_longest(ours, theirs):
        for kind, name, choice in filter(None, pair):
            sides[prefix + name] = run_side(prefix + name, kind, settings | choice, ranks=options.ranks)
    return sides


def _compared(
    sides: dict[str, Side], methods: list[str], engines: tuple[str, ...], prefix: str = ""
) -> list[Comparison]:
    """Speed and memory beside the fastest peer that shards, and beside DDP; wire bytes beside their bound."""
    sharding = [prefix + PEERS[peer] for peer in SHARDING_PEERS if prefix + PEERS[peer] in sides]
    best = max(sharding, key=lambda name: sides[name].metrics.get("tokens_per_second", 0.0))
    found = []
    for name in [f"{prefix}{method}, {engine}" for method in methods for engine in engines]:
        peers = [prefix + PEERS["ddp"]] if name.endswith("replicated") else [best, prefix + PEERS["ddp"]]
        for metric in ("tokens_per_second", "cpu_seconds", "training_peak_bytes", "base_bytes"):
            found += [compare(sides, metric, name, peer) for peer in peers]
        found.append(compare(sides, "wire_bytes", name, None, sides[name].metrics.get("bound_bytes")))
    return found


def run_config(settings: dict[str, Any]) -> RunConfig:
    """The run that a side of ours makes steps of."""
    tree = {key: dict(values) for key, values in METHODS[settings["method"]].items()}
    tree["method"] |= {"rank": settings["rank"], "alpha": 16.0} | settings.get("method_changes", {})
    tree["sharding"] = {"engine": settings["engine"], "device": settings["device"]}
    tree["sharding"]["group"] = settings.get("group", "world")
    tree["train"] = {"precision": settings["precision"]}
    return RunConfig.model_validate({"output_dir": "unused", "model": {"path": settings["model"]}, **tree})


def ours(settings: dict[str, Any]) -> dict[str, float]:
    """Our training step on this rank."""
    config, device = run_config(settings), torch.device(settings["device"])
    _import_packages(settings["engine"], device)
    memory = Memory(device)
    skeleton = build_skeleton(config.model, config.quantization, compute_dtype(settings["precision"], device))
    tables = sum(map(_bytes_of, skeleton.units.tables))
    rest = _bytes_of(skeleton.units.root) - _bytes_of(skeleton.embedding)
    parts = assemble(config, skeleton, make_spec(config, skeleton), device)
    training = make_train_step(
        config,
        parts,
        BaseForward(parts.base, device),
        accumulation=settings["accumulation"],
        total_steps=settings["steps"] + 2,
        group=new_group(device, config.sharding.timeout_seconds),
    )
    flat = training.flat
    flat.broadcast()
    step = _stepper(config, training, settings)
    gathered, reduced = parts.engine.traffic.gathered_bytes, flat.reduced_bytes
    found = measure_steps(step, settings["steps"], memory, device)
    world, done = dist.get_world_size(), settings["steps"] + 2
    gathered = (parts.engine.traffic.gathered_bytes - gathered) / done
    reduced = (flat.reduced_bytes - reduced) / done
    tokens = settings["rows"] * settings["length"] * settings["accumulation"] * world
    if "product_weights" in settings:
        found["share_of_ceiling"] = share_of_ceiling(settings, found["seconds"], device)
    return found | {
        "tokens_per_second": tokens / found["seconds"],
        "base_bytes": parts.engine.resident_bytes(),
        "reduced_bytes": reduced,
        "counted_bytes": world * gathered + 2 * (world - 1) * reduced,
        "bound_bytes": wire_bound(tables, rest, reduced, world, settings["accumulation"] if gathered else 0),
    }


def _import_packages(engine: str, device: torch.device) -> None:
    """Import what the step needs before its memory counts, as the peers do."""
    import bitsandbytes  # noqa: F401
    import torch._dynamo  # noqa: F401 - by the optimizer's first step

    make_engine(engine).start(device)


def wire_bound(tables: int, rest: int, reduced: float, world: int, micro_batches: int) -> float:
    """The fewest bytes that all N ranks together must send in a step, if none holds more than its part in between.

    Each rank receives the (N-1)/N it lacks of the base in a micro-batch's forward pass, and of all but the vocabulary
    tables (whose gradient nobody needs) in its backward pass; a ring all-reduce sends 2 (N-1)/N of its buffer per rank:

        (N-1) * (micro_batches * (tables + 2 * rest) + 2 * reduced)

    Args:
        tables: bytes of the vocabulary tables; a tied one counts once.
        rest: bytes of everything else of the base.
        reduced: bytes of the buffer that is reduced once per step.
        micro_batches: of one rank in one step; 0 where the base is replicated.
    """
    return (world - 1) * (micro_batches * (tables + 2 * rest) + 2 * reduced)


def _bytes_of(unit: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in unit.parameters())


def _stepper(config: RunConfig, training: TrainStep, settings: dict[str, Any]) -> Callable[[int], None]:
    count, rank, parts = settings["accumulation"], dist.get_rank(), training.parts
    parts.trainables.train()
    batches = [
        micro_batch(random_ids(parts.base.vocab_size, settings["rows"], settings["length"], index), index)
        for index in range(rank * count, (rank + 1) * count)
    ]

    def step(number: int) -> None:
        training.run(number, batches, check_digest=number % config.sharding.digest_steps == 0)

    return step
