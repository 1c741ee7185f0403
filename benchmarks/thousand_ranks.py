"""The real training step of one rank of 8 to 4,096, beside its plan: the second table of `docs/scaling.md`.

    PYTHONPATH=. python benchmarks/thousand_ranks.py [--models 8B,70B] [--raw FILE]

Every run goes through the package's own sharding and step, with torch's fake process group as the network and fake
tensors as the model (`tests/support/fake_ranks.py`): nothing is computed, all shapes are. A line of 70B takes up to
20 minutes of a CPU, so the last of them and those of 405B have a tenth of their layers, which are all alike. Rows of
2,048 tokens, one per micro-batch and step, gradient checkpointing (not with qst), nodes of 8 ranks.
"""

import argparse
import copy
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PretrainedConfig

from benchmarks.hardware import METHODS, SHAPES
from dist_qft.config.schema import RunConfig
from dist_qft.plan import make_plan, planned_base
from dist_qft.training.run_plan import RunPlan
from tests.support.fake_ranks import Rehearsal, planned_passing, rehearse

RANKS_PER_NODE = 8
MODELS = {name.split(" ")[0]: config for name, config in SHAPES.items()}
NAMES = {name.split(",")[0]: sections for name, sections in METHODS.items()}


@dataclass(frozen=True)
class Run:
    """A line of the table."""

    model: str
    ranks: int
    method: str
    engine: str
    group: str
    spread: bool
    layers: int | None = None  # of the model's own, by default all


# Every engine, group and method at every number of ranks with another of the rest.
RUNS = (
    Run("8B", 8, "qlora", "zero", "world", False),
    Run("8B", 128, "qahira", "replicated", "world", True),
    Run("8B", 1024, "qst", "fsdp", "world", True),
    Run("8B", 4096, "qlora", "replicated", "world", True),
    Run("70B", 8, "qst", "zero", "world", False),
    Run("70B", 128, "qlora", "fsdp", "node", False),
    Run("70B", 1024, "qahira", "zero", "node", True),
    Run("70B", 4096, "qlora", "fsdp", "world", True, 8),
    Run("405B", 8, "qahira", "fsdp", "world", True, 12),
    Run("405B", 128, "qlora", "zero", "world", False, 12),
    Run("405B", 1024, "qst", "fsdp", "node", True, 12),
    Run("405B", 4096, "qahira", "fsdp", "node", True, 12),
)
COLUMNS = (
    "model", "ranks", "method, engine, group, optimizer", "base received per micro-batch, GiB", "over all ranks, GiB",
    "base, trainables, gradients, moments, GiB", "rest, GiB: step", "plan",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="which models")
    parser.add_argument("--raw", type=Path, help="JSON lines with all that was found")
    asked = parser.parse_args()
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for run in RUNS:
        if run.model in asked.models.split(","):
            with tempfile.TemporaryDirectory() as folder:
                model_of(run).save_pretrained(folder)
                plan, found = compared(config_of(run, folder))
            if asked.raw is not None:
                with asked.raw.open("a") as raw:
                    raw.write(json.dumps({"run": asdict(run), "found": asdict(found), "plan": plan.to_dict()}) + "\n")
            print(row(run, plan, found), flush=True)


def model_of(run: Run) -> PretrainedConfig:
    """The configuration of a line's model."""
    model = copy.deepcopy(MODELS[run.model])
    model.num_hidden_layers = run.layers or model.num_hidden_layers
    return model


def config_of(run: Run, folder: str) -> RunConfig:
    """The run of a line."""
    return RunConfig.model_validate(
        {
            "output_dir": "unused",
            "model": {"path": folder},
            "data": {"train": {"path": "stdlib-docs"}, "max_length": 2048},
            "sharding": {"device": "cpu", "engine": run.engine, "group": run.group},
            "train": {
                "max_steps": 1,
                "precision": "bfloat16",
                "global_batch_size": run.ranks,
                "per_device_train_batch_size": 1,
                "gradient_checkpointing": run.method != "qst",
                "shard_optimizer": run.spread,
            },
            **NAMES[run.method],
        }
    )


def compared(config: RunConfig) -> tuple[RunPlan, Rehearsal]:
    """The plan of a run, and what its step was found to do."""
    ranks, base = config.train.global_batch_size, planned_base(config)
    return make_plan(config, ranks, RANKS_PER_NODE, base=base), rehearse(config, base, ranks, fake=True)


def row(run: Run, plan: RunPlan, found: Rehearsal) -> str:
    """A line of the table; a figure that is not the plan's own is followed by the plan's."""
    over_all = sum(size for _, _, size in found.step)
    held = [_beside(size, plan.memory[part]) for part, size in found.memory.items()]
    planned = planned_passing(plan)
    cells = [
        run.model
        if run.layers is None
        else f"{run.model}, {run.layers} of {MODELS[run.model].num_hidden_layers} layers",
        f"{run.ranks:,}",
        f"{run.method}, {run.engine}, {run.group}, {'spread' if run.spread else 'whole'}",
        _beside(found.received[0], plan.gather_bytes_per_micro_batch),
        _beside(over_all, sum(plan.collective_bytes_per_step.values())),
        ", ".join(held),
        f"{found.passing / 2**30:.2f}",
        f"{planned / 2**30:.2f} ({planned / found.passing - 1:+.1%})",
    ]
    return f"| {' | '.join(cells)} |"


def _beside(found: int, planned: int) -> str:
    same = f"{found / 2**30:.3f}"
    return same if found == planned else f"{same} (plan: {planned / 2**30:.3f})"


if __name__ == "__main__":
    main()
