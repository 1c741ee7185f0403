"""launch/torchrun.sh as users start it, and the form of all launch scripts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def run_script(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """launch/torchrun.sh with this interpreter in the place of the user's active environment."""
    environment = {key: value for key, value in os.environ.items() if key not in ("NNODES", "NPROC_PER_NODE")}
    environment |= {
        "VIRTUAL_ENV": sys.prefix,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        **variables,
    }
    command = ["bash", str(REPOSITORY / "launch/torchrun.sh"), *arguments]
    return subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)


def test_script_needs_a_config_and_a_place_among_the_nodes() -> None:
    for arguments, variables, message in (
        ([], {}, "torchrun.sh: the first argument must be a config file; usage: launch/torchrun.sh CONFIG"),
        (["--dry-run"], {}, "torchrun.sh: the first argument must be a config file; usage: launch/torchrun.sh CONFIG"),
        (["c.yaml"], {"NNODES": "2"}, "torchrun.sh: NNODES=2 also needs NODE_RANK and MASTER_ADDR; usage: "),
    ):
        result = run_script(*arguments, **variables)
        assert result.stderr.startswith(message)
        assert result.stderr.count("\n") == 1
        assert result.returncode == 2


def test_dry_run_prints_the_command_and_runs_the_real_program() -> None:
    """The script, the launcher and one process in a row; that process misses the file."""
    nodes = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0"}
    result = run_script("no such.yaml", "train.seed=1", "--resume", "auto", "--dry-run", NPROC_PER_NODE="3", **nodes)
    # The interpreter may be called python or python3: what counts is the environment it belongs to.
    interpreter, command = result.stdout.strip().split(" ", 1)
    assert Path(interpreter).parent == Path(sys.executable).parent
    assert command == (
        "-m dist_qft.launch --nproc-per-node 3 --nnodes 2 --node-rank 1 --master-addr node0"
        " --master-port 29500 -- train 'no such.yaml' train.seed=1 --resume auto"
    )
    assert "no such.yaml" in result.stderr
    assert result.returncode == 2


@pytest.mark.parametrize("script", sorted(REPOSITORY.glob("launch/*.sh")), ids=lambda path: path.name)
def test_scripts_parse_and_stay_short(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert len(script.read_text().splitlines()) < 50
