"""`bench mixture`: a training step on a mixture of experts, ours beside PEFT's, a LoRA on the linear layers of both.

Our experts are packed in 4 bits. PEFT's base has the same linear layers in 4 bits, but bitsandbytes knows linear layers
alone: the stacked experts stay floats, whole on every rank, and DDP is the only wrapper that runs.
"""

from typing import Any

from dist_qft.bench.models import dense_folder
from dist_qft.bench.options import Options
from dist_qft.bench.processes import run_side
from dist_qft.bench.report import Report, compare

_METRICS = ("tokens_per_second", "cpu_seconds", "training_peak_bytes", "base_bytes")


def run(options: Options) -> Report:
    """QLoRA on attention, sharded and replicated, beside PEFT under DDP; and ours with adapters on the experts, too."""
    rows, length = (1, 32) if options.quick else (2, 128)
    settings = options.common() | {
        "model": str(dense_folder("tiny-moe" if options.quick else "qwen3-moe")),
        "rows": rows,
        "length": length,
        "accumulation": 1,
        "steps": options.steps,
        "rank": 16,
    }
    peer = run_side("PEFT, DDP", "peer", settings | {"peer": "ddp"}, ranks=options.ranks)
    sides = {peer.name: peer}
    choices: dict[str, dict[str, Any]] = {"qlora, fsdp": {"engine": "fsdp"}}
    if not options.quick:
        choices["qlora, replicated"] = {"engine": "replicated"}
        choices["qlora on experts, fsdp"] = {"engine": "fsdp", "method_changes": {"targets": ["all", "experts"]}}
    for name, choice in choices.items():
        sides[name] = run_side(name, "ours", settings | {"method": "qlora"} | choice, ranks=options.ranks)
    comparisons = [compare(sides, metric, name, peer.name) for name in choices for metric in _METRICS]
    return Report("mixture", settings | {"ranks": options.ranks}, list(sides.values()), comparisons)
