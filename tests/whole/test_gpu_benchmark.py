"""`benchmarks/gpu.sh` in small on a CPU: every part runs, and what its file has already is left alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CPU = {"measured on": {"device": "CPU", "ranks": 1, "quick": True}}
NOT_QUICK = {"paged optimizers of a run that was stopped", "a step that memory is too small for"}
NOT_QUICK_SEVERAL = {
    "communication that nothing hides",
    "merged by several ranks",
    "hundreds of small steps",
    "launchers",
    "a rank that is killed",
    "a rank that is stopped",
    "a full disk",
    "a restart after a killed rank",
}
KNOWN = {"bfloat16 product, TFLOP/s": 123.0}


def run(path: Path, *words: str) -> tuple[dict, subprocess.CompletedProcess]:
    """The figures and the end of a trial on CPUs."""
    command = [ROOT / "benchmarks/gpu.sh", "--device", "cpu", "--quick", "--json", path, *words]
    env = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
    return json.loads(path.read_text()), done


def skipped(found: dict) -> set[str]:
    return {name for name, part in found.items() if "skipped" in part}


def test_every_part_for_one_gpu(tmp_path):
    path = tmp_path / "figures.json"
    path.write_text(json.dumps({**CPU, "products": KNOWN, "loading": {"failed": "an earlier call was stopped here"}}))
    found, done = run(path)
    assert done.returncode == 0, done.stderr
    assert found["products"] == KNOWN
    assert not [name for name, part in found.items() if "failed" in part] and "qst, 4096 tokens" in found
    assert all(part["tokens/s"] > 0 for name, part in found.items() if "tokens" in name and "skipped" not in part)
    assert max(value for key, value in found["gradient of the loss, bfloat16"].items() if key[:2] == "p ") < 0.01
    assert set(found["no waits within a micro-batch"]) >= {"qlora", "qbara", "qahira", "qst"}
    assert found["qahira, 4096 tokens"]["tokens/s"] > 0 and f"figures: {path}" in done.stdout
    assert skipped(found) <= {*NOT_QUICK, "PEFT with bitsandbytes, 4096 tokens"}
    assert found["a run that was stopped"]["adamw"] and found["merged results and answers"]["merged, gguf"]


def test_every_part_for_two_ranks(tmp_path):
    """Those of one group of processes, and those that start commands; what the group has done is not done again."""
    path = tmp_path / "figures.json"
    known = dict.fromkeys(("qahira, fsdp", "qahira, replicated"), KNOWN)
    path.write_text(json.dumps({"measured on": {**CPU["measured on"], "ranks": 2}, **known}))
    found, done = run(path, "--ranks", "2")
    assert done.returncode == 0, done.stderr
    assert not [name for name, part in found.items() if "failed" in part] and found["qahira, fsdp"] == KNOWN
    assert skipped(found) <= {*NOT_QUICK_SEVERAL, "qahira, zero"}
    gathered, planned = found["engines agree"]["fsdp: bytes gathered, planned"]
    assert gathered == planned > 0
    assert len(set(list(found["the same adapter on 1, 2 and N ranks"].values())[:2])) == 1
    assert found["an error on one rank"]["exit code"] == 1 and f"figures: {path}" in done.stdout


def test_a_machine_without_gpus_is_told_so():
    env = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([ROOT / "benchmarks/gpu.sh"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--device: got cuda for 1 ranks, PyTorch finds 0 GPUs here" in done.stderr


def test_figures_of_another_device_are_not_taken_for_this_ones(tmp_path):
    """Of a trial on a CPU, say, with tiny shapes: the table of a GPU would have shown them."""
    path = tmp_path / "figures.json"
    for other in ({"device": "NVIDIA H100", "ranks": 1, "quick": True}, {**CPU["measured on"], "quick": False}, None):
        path.write_text(json.dumps({"measured on": other, "products": KNOWN}))
        command = [ROOT / "benchmarks/gpu.sh", "--device", "cpu", "--quick", "--json", path]
        env = {**os.environ, "PYTHON": sys.executable}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and f"--json: got {path}" in done.stderr
        assert json.loads(path.read_text())["products"] == KNOWN
