"""`pip install -c constraints.txt` finds versions that agree for every build of torch, and these tests run on them.

uv resolves from metadata alone: pip would download the gigabytes of CUDA libraries first.
"""

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

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
