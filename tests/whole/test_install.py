"""`pip install -c constraints.txt` finds versions that agree for every build of torch, these tests run on them, and a
wheel has all that the program needs.

uv resolves from metadata alone: pip would download the gigabytes of CUDA libraries first.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from tests.support.tiny_model import save_tiny_model, tiny_llama_config, write_data

ROOT = Path(__file__).resolve().parents[2]
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


def resolve(python: str, *options: str) -> dict[str, str]:
    """The version of every package that an install on Linux would choose, with no configuration of this machine."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-config", "--no-annotate", "--no-header"]
    command += ["--python-version", python, "--python-platform", "x86_64-manylinux_2_28", *options]
    command += ["--constraint", "constraints.txt", "--all-extras", "pyproject.toml"]
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}
    run = subprocess.run(command, cwd=ROOT, env=plain, capture_output=True, text=True, timeout=300, check=False)
    if "Failed to fetch" in run.stderr:
        pytest.skip(f"the package index cannot be reached: {run.stderr.splitlines()[0]}")
    assert run.returncode == 0, run.stderr
    return dict(line.split("==") for line in run.stdout.split() if "==" in line)


@pytest.mark.parametrize("python", ["3.11", "3.13"])
def test_default_index_with_cuda(python: str) -> None:
    chosen = resolve(python)
    assert chosen["torch"] == PINS["torch"] and chosen["triton"] == PINS["triton"]
    assert any(name.startswith("nvidia-") for name in chosen)


def test_cpu_build() -> None:
    chosen = resolve("3.11", "--torch-backend", "cpu")
    assert chosen["torch"] == PINS["torch"] + "+cpu" and chosen["triton"] == PINS["triton"]
    assert not any(name.startswith("nvidia-") for name in chosen)


def test_these_are_the_installed_versions() -> None:
    """A build may carry a local suffix (`2.13.0+cpu`), nothing else may differ from what `constraints.txt` promises."""

    def installed(name: str) -> str:
        try:
            return version(name).partition("+")[0]
        except PackageNotFoundError:
            return "not installed"

    assert {name: installed(name) for name in PINS} == PINS


def test_a_wheel_has_the_whole_package_and_works_without_the_repository(tmp_path: Path) -> None:
    source, installed = tmp_path / "source", tmp_path / "installed"
    shutil.copytree(ROOT / "dist_qft", source / "dist_qft", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    subprocess.run(build, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("dist_qft-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    ours = {str(path.relative_to(source)) for path in (source / "dist_qft").rglob("*") if path.is_file()}
    assert {str(path.relative_to(installed)) for path in (installed / "dist_qft").rglob("*") if path.is_file()} == ours
    (entries,) = installed.glob("*.dist-info/entry_points.txt")
    assert "dist-qft = dist_qft.__main__:run" in entries.read_text()

    # The files beside the code are found where the wheel puts them: the starter of `init`, the machines of `validate`.
    env = {**os.environ, "PYTHONPATH": str(installed)}
    model, data = save_tiny_model(tmp_path / "model", tiny_llama_config()), write_data(tmp_path / "rows.jsonl", 108)
    flags = ["--model", model, "--data", data, "--goal", "exact", "--gpus", "0", "--output", "run"]
    for words in (["init", "run.yaml", *flags], ["validate", "run.yaml", "--hardware", "H100"]):
        command = [sys.executable, "-m", "dist_qft", *words]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
