"""A method, a tile method, an engine, a quantization format and an export target, added to a copy of the package.

Each is a file of its own, a line in its family's door, and its name in the schema: all that CONTRIBUTING.md asks for.
The copy plans, trains, merges and evaluates with them.
"""

import json
from pathlib import Path
from typing import Any

from tests.support.extended_package import extended_package, run_commands
from tests.support.tiny_model import write_data


def write_config(path: Path, model: Path, data: Path, **sections: Any) -> Path:
    """A config with the new engine and the new format; its output_dir is `path` without the suffix."""
    tree = {
        "output_dir": str(path.with_suffix("")),
        "model": {"path": str(model)},
        "quantization": {"linear": "half"},
        "data": {"train": {"path": str(data)}, "eval_samples": 8, "max_length": 64},
        "train": {"max_steps": 3, "global_batch_size": 4, "learning_rate": 0.02},
        "sharding": {"engine": "lent", "device": "cpu", "prefetch_megabytes": 7.0},
        **sections,
    }
    path.write_text(json.dumps(tree))
    return path


def test_one_of_each_family_is_added_where_contributing_says(tiny_llama: Path, tmp_path: Path) -> None:
    package, data = extended_package(tmp_path / "extended"), write_data(tmp_path / "data.jsonl", 24)
    patch = {"name": "patch", "side": 4, "targets": ["q_proj"]}
    tiles = write_config(tmp_path / "patch.yaml", tiny_llama, data, method=patch, merge={"at_end": "sums"})
    vector = write_config(tmp_path / "shift.yaml", tiny_llama, data, method={"name": "shift", "start": 0.25})
    plans = ["validate", tiles, "--json", "--world-size", 2]
    printed = run_commands(
        package,
        plans,
        [*plans, "sharding.engine=fsdp"],
        ["train", tiles],
        ["train", vector],
        ["eval", vector.with_suffix(""), "--json"],
    )

    lent, fsdp = map(json.loads, printed[:2])
    assert lent["engine"] == "lent" and lent["method"] == "patch"
    assert lent["trainable_parameters"] == 3 * 64 * 64 // 16
    assert {"name": "half"} in [row["format"] for row in lent["base_formats"]]
    assert lent["base_bytes_per_rank"] == 2 * lent["base_bytes"] == 2 * fsdp["base_bytes"]
    # fsdp receives the other rank's half of what this engine receives three times.
    assert lent["gather_bytes_per_micro_batch"] == 6 * fsdp["gather_bytes_per_micro_batch"]

    summary = json.loads((tmp_path / "patch/summary.json").read_text())
    assert summary["method"] == "patch"
    assert len(json.loads((tmp_path / "patch/sums.json").read_text())) == 23
    assert summary["gather_bytes_per_step"] > 0 and summary["gather_bytes_per_step"] % 7 == 0

    figures = json.loads(printed[-1])
    assert figures["tuned"]["loss"] != figures["base"]["loss"]
