"""Measure the loss that a side network reaches on SmolLM2 in minutes, with two ranks and the command line; not a test.

    PYTHONPATH=. python benchmarks/qst_learning.py [SmolLM2.gguf]

First causal LM on `stdlib-docs`: held-out loss before and after. Then a classification task made of the same real text,
to which of four standard-library packages a docstring belongs (signature and names that give it away taken out):
held-out accuracy beside the share of the largest class.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import yaml

from dist_qft.data import stdlib_docs
from tests.conftest import default_smollm2

PACKAGES = 4
TRAIN = {"global_batch_size": 16, "per_device_train_batch_size": 8, "warmup_ratio": 0.1, "lr_scheduler_type": "cosine"}


def docstrings(folder: Path) -> dict:
    """Writes train.jsonl and eval.jsonl of {"text", "label"} rows; returns the config's task section."""
    samples = [*stdlib_docs.load("train"), *stdlib_docs.load("eval")]
    packages = [name for name, _ in Counter(sample["module"] for sample in samples).most_common(PACKAGES)]
    rows = []
    for sample in samples:
        text = sample["messages"][1]["content"].rpartition("`\n\n")[2]
        if sample["module"] in packages and not any(package in text.lower() for package in packages):
            rows.append({"text": text, "label": sample["module"]})
    held_out = len(rows) // 5
    for name, part in {"eval": rows[:held_out], "train": rows[held_out:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    largest, count = Counter(row["label"] for row in rows[:held_out]).most_common(1)[0]
    print(f"{len(rows)} docstrings of {', '.join(packages)}; held out {held_out}, of which {largest} has {count}")
    print(f"majority class: accuracy {count / held_out:.3f}", flush=True)
    return {"name": "classification", "labels": packages}


def run(folder: Path, sections: dict) -> dict:
    """Train on two ranks through the launcher; the run's summary."""
    config = {
        "output_dir": str(folder / "run"),
        "model": {"path": sys.argv[1] if len(sys.argv) > 1 else str(default_smollm2())},
        "quantization": {"linear": "affine4", "block": [1, 32], "embedding": "q8_0"},
        "method": {"name": "qst", "reduction": 8, "downsample": "adapter", "downsample_rank": 16},
        "sharding": {"device": "cpu"},
        **sections,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    launcher = [sys.executable, "-m", "dist_qft.launch", "--nproc-per-node", "2", "--"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([*launcher, "train", str(folder / "run.yaml")], check=True, env=environment)
    return json.loads((folder / "run" / "summary.json").read_text())


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        task = docstrings(folder)
        data = {"train": {"path": str(folder / "train.jsonl")}, "eval": {"path": str(folder / "eval.jsonl")}}
        train = {**TRAIN, "max_steps": 48, "learning_rate": 3e-3}
        labels = run(folder, {"task": task, "data": {**data, "max_length": 64}, "train": train})
        print({key: value for key, value in labels.items() if "eval" in key}, flush=True)
    with tempfile.TemporaryDirectory() as name:
        data = {"train": {"path": "stdlib-docs"}, "eval": {"path": "stdlib-docs", "split": "eval", "limit": 48}}
        train = {**TRAIN, "max_steps": 40, "learning_rate": 1e-2}
        tokens = run(Path(name), {"data": {**data, "max_length": 128}, "train": train})
        print({key: value for key, value in tokens.items() if "eval" in key}, flush=True)


if __name__ == "__main__":
    main()
