"""The real program without its optional packages: it does not need them, and a request for one gives one line."""

import os
import subprocess
import sys
from pathlib import Path

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


# The command twice in one process, since starting one costs seconds; its codes are the last line.
TWICE = """
import sys
from dist_qft.cli import main

config, codes = sys.argv[1], []
for overrides in (["sharding.engine=zero"], []):
    sys.argv = ["dist-qft", "train", config, *overrides]
    try:
        main()
    except SystemExit as end:
        codes.append(end.code or 0)
print(codes)
"""


def test_fsdp_needs_neither_deepspeed_nor_mpi4py_and_zero_says_what_it_needs(tiny_llama, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    settings = tiny_config(tiny_llama, tmp_path / "run", train={"max_steps": 1}).model_dump(exclude_none=True)
    YAML(typ="safe").dump(settings, tmp_path / "run.yaml")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    command = [sys.executable, "-c", TWICE, tmp_path / "run.yaml"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[2, 0]", done.stderr
    told = "error: sharding.engine: zero needs DeepSpeed, which is not installed; pip install 'dist-qft[deepspeed]'\n"
    assert done.stderr.startswith(told)
    assert "step 1/1" in done.stderr
