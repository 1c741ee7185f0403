"""What is not installed is not needed, and asking for it is one line: the packages are hidden from the real program."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.support.tiny_model import tiny_config

REPOSITORY = Path(__file__).parents[2]

# Python runs this module before anything else.
HIDE = """
import importlib.machinery, sys

class Installed(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] not in ("deepspeed", "mpi4py"):
            return super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Installed
"""


@pytest.fixture
def train(tiny_llama, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    settings = tiny_config(tiny_llama, tmp_path / "run", train={"max_steps": 1}).model_dump(exclude_none=True)
    YAML(typ="safe").dump(settings, tmp_path / "run.yaml")

    def run(*overrides: str) -> "subprocess.CompletedProcess[str]":
        env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
        command = [sys.executable, "-m", "dist_qft", "train", str(tmp_path / "run.yaml"), *overrides]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)

    return run


def test_fsdp_needs_neither_deepspeed_nor_mpi4py(train):
    result = train()
    assert result.returncode == 0, result.stderr
    assert "step 1/1" in result.stderr


def test_zero_without_deepspeed(train):
    result = train("sharding.engine=zero")
    assert result.stderr == (
        "error: sharding.engine: zero needs DeepSpeed, which is not installed; pip install 'dist-qft[deepspeed]'\n"
    )
    assert result.returncode == 2
