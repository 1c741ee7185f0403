"""Run every command that README and docs show, word for word, in a copy of the repository, and print how each ended.

    PYTHONPATH=. python benchmarks/documented_commands.py [PAGE ...]

Where a command names a config, a study, data or a run of its reader's, a small one stands in the copy under that name,
so that the command itself is not changed. About ten minutes on two cores. `tests/support/documented.py` has the
commands, and the reason for each that is left out: it needs a GPU, the Hub or several machines, or a test runs it.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from dist_qft.config.load import save_config
from tests.support.documented import ROOT, documented_commands
from tests.support.study_files import write_study
from tests.support.tiny_model import save_tiny_model, tiny_config, write_data

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
# A run of the quickstart's kind, one step long, for the commands that take a run.
QUICKSTART = "configs/quickstart.yaml train.max_steps=1 data.eval.limit=4 evaluation.max_new_tokens=4 merge.at_end=null"
RUNS = ("runs/smollm2-qalora", "runs/first", "runs/my-run", "runs/mine", "runs/llama-8b-qlora", "runs/run")
CONFIGS = ("configs/llama-8b/qlora.yaml", "my.yaml", "run.yaml", "CONFIG")


def main() -> int:
    """Run the commands in the order of the pages; the number of those that failed."""
    failed = 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "dist_qft"
        prepare(folder)
        for command in documented_commands():
            if sys.argv[1:] and command.page not in sys.argv[1:]:
                continue
            if command.left_out:
                print(f"| {command.page} | `{command.text}` | left out: {command.left_out} |", flush=True)
                continue
            done = execute(folder, command.text)
            failed += done.returncode != 0
            print(f"| {command.page} | `{command.text}` | exit code {done.returncode} |", flush=True)
            if done.returncode:
                print(done.stdout[-2000:], done.stderr[-2000:], file=sys.stderr)
    return failed


def prepare(folder: Path) -> None:
    """Copy the tracked files, and put small things under every name that the pages use for a reader's own."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in tracked.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    os.symlink(ROOT / "models", folder / "models")
    (folder / "my.jsonl").write_text((json.dumps(CHAT) + "\n") * 40)
    data = write_data(folder / "tiny.jsonl")
    model = save_tiny_model(folder / "tiny-model")
    write_study(folder, model, seeds=[0]).rename(folder / "STUDY.yaml")
    short = execute(folder, f"launch/torchrun.sh {QUICKSTART}")
    if short.returncode:
        sys.exit(short.stderr)
    for name in RUNS:
        shutil.copytree(folder / "runs/quickstart", folder / name)
    for name in CONFIGS:
        config = tiny_config(
            model,
            folder / "runs" / f"of-{Path(name).stem}",
            data={"train": {"path": str(data)}, "eval_samples": 8},
            train={"max_steps": 1, "global_batch_size": 128, "per_device_train_batch_size": 1},  # also for 128 GPUs
        )
        save_config(config, folder / name)


def execute(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    """Run a command there on two ranks, as in an activated environment."""
    typed = "Hi\n" if command.startswith("dist-qft chat") else ""
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix, "PYTHONPATH": str(folder), "NPROC_PER_NODE": "2"}
    environment["PATH"] = f"{sys.prefix}/bin:{environment['PATH']}"
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, input=typed, capture_output=True, text=True
    )


if __name__ == "__main__":
    sys.exit(main())
