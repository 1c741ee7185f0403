"""The planned peak memory beside the measured one, for real runs of SmolLM2 on two ranks: a table of `docs/scaling.md`.

    PYTHONPATH=. python benchmarks/plan_memory.py [NUMBER ...]

Methods, engines, and checkpointing on and off; packed rows of 512 tokens, one per micro-batch, two steps. Measured is
the largest resident size of the fuller rank over its whole life (`peak_rss_bytes` of summary.json, the kernel's own);
in a second table, the largest one until the base was loaded (`load_peak_rss_bytes`) beside the planned one.
Memory does not depend on what else the machine does: the runs need no idle one. They take 10 minutes.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from dist_qft.bench.models import GGUF, cache
from dist_qft.config.schema import RunConfig
from dist_qft.plan import make_plan

RANKS = 2
NF4 = {"linear": "nf4", "block": [64], "double_quant": True}
METHODS: dict[str, dict[str, Any]] = {
    "qlora": {"method": {"name": "qlora", "rank": 16}, "quantization": NF4},
    "qahira": {
        "method": {"name": "qahira", "pool": 32, "repeat": 1, "rank": 16},
        "quantization": {"linear": "affine4", "block": [1, 32]},
    },
    "qst": {"method": {"name": "qst"}, "quantization": NF4},
}
RUNS = (
    ("qlora", "fsdp", False),
    ("qlora", "replicated", True),
    ("qahira", "zero", False),
    ("qahira", "fsdp", True),
    ("qst", "replicated", False),
    ("qst", "zero", False),
)
PARTS = ("base", "gathered", "trainables", "gradients", "moments", "activations", "workspace", "allocator", "runtime")


def main() -> None:
    print(f"| run | measured, MiB | planned | | {' | '.join(PARTS)} |\n{'|---' * (4 + len(PARTS))}|")
    loading = ["| run, while loading | measured, MiB | planned | |\n|---|---|---|---|"]
    for number in map(int, sys.argv[1:] or range(len(RUNS))):
        method, engine, checkpointing = RUNS[number]
        with tempfile.TemporaryDirectory() as folder:
            tree = tree_of(method, engine, checkpointing, folder)
            plan = make_plan(RunConfig.model_validate(tree), RANKS)
            while_loading, measured = peaks_of(tree, Path(folder))
        name = f"{method}, {engine}{', checkpointing' if checkpointing else ''}"
        parts = " | ".join(f"{plan.memory[part] / 2**20:.0f}" for part in PARTS)
        print(f"| {name} | {beside(measured, plan.peak_bytes)} | {parts} |", flush=True)
        loading.append(f"| {name} | {beside(while_loading, plan.load_peak_bytes)} |")
    print("", *loading, sep="\n")


def beside(measured: int, planned: int) -> str:
    """Both in MiB, and how much of the measured one the plan is off."""
    return f"{measured / 2**20:.0f} | {planned / 2**20:.0f} | {planned / measured - 1:+.1%}"


def tree_of(method: str, engine: str, checkpointing: bool, folder: str) -> dict[str, Any]:
    """The config of a run."""
    return {
        "output_dir": f"{folder}/run",
        "model": {"path": str(cache() / GGUF)},
        "data": {"train": {"path": "stdlib-docs", "limit": 200}, "max_length": 512, "packing": True},
        "train": {
            "max_steps": 2,
            "warmup_steps": 0,
            "global_batch_size": 2,
            "per_device_train_batch_size": 1,
            "gradient_checkpointing": checkpointing,
        },
        "sharding": {"engine": engine, "device": "cpu"},
        **METHODS[method],
    }


def peaks_of(tree: dict[str, Any], folder: Path) -> tuple[int, int]:
    """Peak resident bytes of the fuller rank of a run: while it loads, and over all of it."""
    config = folder / "run.yaml"
    config.write_text(json.dumps(tree))  # JSON is YAML
    words = [sys.executable, "-m", "dist_qft.launch", "--nproc-per-node", str(RANKS), "--", "train", str(config)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(words, check=True, env=environment, stdout=subprocess.DEVNULL)
    summary = json.loads((folder / "run" / "summary.json").read_text())
    return int(summary["load_peak_rss_bytes"]), int(summary["peak_rss_bytes"])


if __name__ == "__main__":
    main()
