"""The shell scripts, with neither ranks nor Slurm: they parse, shellcheck is content, a mistake is one line."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from dist_qft.cli import app
from dist_qft.cli.preload import MODULES

ROOT = Path(__file__).resolve().parents[2]
PARTS = [  # sourced
    ROOT / "slurm/job.sh",
    *(ROOT / f"launch/{name}.sh" for name in ("common", "ranks", "other_nodes", "environment")),
]
SCRIPTS = sorted(
    file
    for folder in ("launch", "slurm", "tests", ".ci", "studies")
    for file in (ROOT / folder).rglob("*")
    if file.is_file() and file.suffix in {"", ".sh", ".sbatch"} and file.read_text().startswith(("#!", "# shellcheck"))
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: str(script.relative_to(ROOT)))
def test_a_script_parses(script):
    assert {ROOT / "launch/torchrun.sh", ROOT / "slurm/train.sbatch", ROOT / ".ci/run", *PARTS} <= {*SCRIPTS}
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say():
    # SC1091: a sourced file that only exists later; SC2034: variables that the sourcing script uses.
    words = ["shellcheck", "--external-sources", "--exclude=SC1091", *map(str, SCRIPTS)]
    checked = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


JOB = {
    "SLURM_JOB_NAME": "dist-qft",
    "SLURM_JOB_ID": "1",
    "SLURM_JOB_NODELIST": "node1",
    "SLURM_NNODES": "2",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "MASTER_ADDR": "node1",
    "VIRTUAL_ENV": sys.prefix,
}


def test_a_step_sees_all_gpus_of_its_node_however_they_were_asked_for(tmp_path):
    """A stub stands for srun: newer Slurms bind GPUs to tasks by variables that the tests' own Slurm does not know."""
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/bash\nenv >$SEEN; echo "$@" >>$SEEN\n')
    srun.chmod(0o755)
    binding = {"SLURM_GPUS_PER_TASK": "1", "SLURM_TRES_PER_TASK": "gres/gpu:1", "SLURM_GPU_BIND": "single:1"}
    variables = JOB | binding | {"SLURM_GPUS_ON_NODE": "4", "LOGS": str(tmp_path), "SEEN": str(tmp_path / "seen")}
    command = f'source slurm/job.sh; PATH={tmp_path}:$PATH; run_step true; exit "$code"'
    done = subprocess.run(["bash", "-c", command], env=os.environ | variables, cwd=ROOT, timeout=30)
    assert done.returncode == 0
    seen = (tmp_path / "seen").read_text()
    assert "--gres=gpu:4 true" in seen
    assert not [name for name in binding if f"{name}=" in seen]


@pytest.mark.parametrize(
    ("codes", "code"), [((75, 75), 75), ((75, 3), 3), ((1, 75), 1), ((4, 3), 3), ((3, 6, 75), 6), ((4, 137), 137)]
)
def test_the_task_that_failed_decides_and_not_those_that_were_stopped_for_it(tmp_path, codes, code):
    """A stub stands for srun, whose own code is the largest one."""
    srun = tmp_path / "srun"
    lines = "".join(f"echo 'srun: error: n{i}: task {i}: Exited with exit code {c}' >&2\n" for i, c in enumerate(codes))
    srun.write_text(f"#!/bin/bash\n{lines}exit {max(codes)}\n")
    srun.chmod(0o755)
    command = f'source slurm/job.sh; PATH={tmp_path}:$PATH; run_step true; exit "$code"'
    environment = os.environ | JOB | {"LOGS": str(tmp_path)}
    done = subprocess.run(["bash", "-c", command], env=environment, cwd=ROOT, capture_output=True, timeout=30)
    assert done.returncode == code


@pytest.mark.parametrize("script", ["pyxis", "apptainer"])
def test_a_job_of_many_nodes_meets_at_the_first(tmp_path, script):
    """Stubs stand for Slurm; the list of the nodes is longer than a pipe holds."""
    for name, body in {"scontrol": 'seq -f "$3-%g" 50000', "srun": 'echo "$MASTER_ADDR"'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    command = ["bash", f"slurm/{script}.sbatch", "c.yaml"]
    environment = os.environ | JOB | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (0, "node1-1\n")


@pytest.mark.parametrize(
    ("script", "words", "variables", "message"),
    [
        ("train", [], {}, "the first argument must be a config file"),
        ("train", ["c.yaml"], {"SLURM_TASKS_PER_NODE": "2,1"}, "2,1 tasks per node"),
        ("train", ["c.yaml"], {"STARTER": "ssh"}, "STARTER is 'ssh'"),
        ("merge", ["--to"], {}, "the first argument must be a run"),
        ("study", ["s.yaml"], {}, "without --array only --report makes sense"),
    ],
)
def test_a_batch_scripts_refusals_are_one_line_and_exit_code_2(tmp_path, script, words, variables, message):
    done = subprocess.run(
        ["bash", f"slurm/{script}.sbatch", *words],
        env=os.environ | JOB | {"LOGS": str(tmp_path)} | variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("dist-qft: ") and done.stderr.count("\n") == 1 and message in done.stderr


@pytest.mark.parametrize("kind", ["launcher", "batch script"])
def test_an_activated_environment_of_conda_wins_over_the_repositorys(tmp_path, kind):
    for name in ("conda/bin", ".venv/bin"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "python").symlink_to(sys.executable)
    for name in ("launch/active.sh", "launch/common.sh", "launch/torchrun.sh", "slurm/job.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    script = {"launcher": 'set -- c.yaml; source launch/common.sh; echo "$python"'}.get(
        kind, "source slurm/job.sh; command -v python"
    )
    shell = {key: value for key, value in (os.environ | JOB).items() if not key.startswith(("VIRTUAL_ENV", "CONDA"))}

    def python(**variables: str) -> str:
        command = ["bash", "-uc", script, str(tmp_path / "launch/torchrun.sh")]
        done = subprocess.run(command, env=shell | variables, cwd=tmp_path, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().removeprefix(f"{tmp_path}/")

    conda = {"CONDA_PREFIX": str(tmp_path / "conda"), "PATH": f"{tmp_path}/conda/bin:{shell['PATH']}"}
    assert python(**conda, CONDA_DEFAULT_ENV="tuning") == "conda/bin/python"
    assert python(**conda, CONDA_DEFAULT_ENV="base") == python() == ".venv/bin/python"
    assert python(**conda | {"CONDA_PREFIX": "/none"}, CONDA_DEFAULT_ENV="tuning") == ".venv/bin/python"


def test_the_launch_scripts_pass_on_the_verbs_that_several_ranks_may_run():
    """Any other first word is a config for `train`."""
    verbs = list(get_command(app).commands)
    assert set(MODULES) < set(verbs)
    script = 'set -- "$0" RUN; source launch/common.sh; echo "$verb ${arguments[*]}"'
    for verb in verbs:
        command = ["bash", "-c", script, verb]
        parsed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True).stdout
        assert parsed == (f"{verb} RUN\n" if verb in MODULES else f"train {verb} RUN\n")


def started(
    tmp_path: Path, script: str, program: str, body: str, **variables: str
) -> "subprocess.CompletedProcess[str]":
    """A launch script over two nodes, with a stub for the launcher and paths of the config in variables."""
    for name, text in {
        "c.yaml": "output_dir: $SCRATCH_OF_RUNS/x\nmodel: {path: '${MODELS}/m'}\n",
        "hosts": "node1 slots=1\nnode2 slots=1\n",
        program: f"#!/bin/bash\n{body}\n",
    }.items():
        (tmp_path / name).write_text(text)
    (tmp_path / program).chmod(0o755)
    ours = {"VIRTUAL_ENV": sys.prefix, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HOSTFILE": str(tmp_path / "hosts")}
    paths = {
        "SCRATCH_OF_RUNS": "/scratch",
        "MODELS": "/models",
        "DATA": "/data",
        "NOT_USED": "1",
        "NPROC_PER_NODE": "1",
    }
    command = ["bash", f"launch/{script}", str(tmp_path / "c.yaml"), "data.train.path=$DATA/x"]
    environment = os.environ | ours | paths | {"HF_HUB_OFFLINE": "1"} | variables
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=30)


def test_open_mpis_other_nodes_get_the_variables_of_paths_and_no_address(tmp_path):
    body = (
        '[[ $1 != --version ]] || { echo "mpirun (Open MPI) 5"; exit; }; echo "$@"; echo "address ${MASTER_ADDR-none}"'
    )
    done = started(tmp_path, "mpirun.sh", "mpirun", body, MASTER_ADDR="node0", MASTER_PORT="1")
    assert done.returncode == 0 and done.stdout.endswith("address none\n"), done.stderr
    for name in ("SCRATCH_OF_RUNS", "MODELS", "DATA", "HF_HUB_OFFLINE"):
        assert f"-x {name} " in done.stdout
    assert not [name for name in ("NOT_USED", "MASTER_ADDR", "MASTER_PORT") if name in done.stdout]


def test_deepspeeds_other_nodes_get_the_variables_but_no_secrets(tmp_path):
    """DeepSpeed puts what it hands on into command lines, and reads it as lines NAME=VALUE of a file."""
    (tmp_path / ".deepspeed_env").write_text("MINE=1\n")
    body = 'echo "$@"; cat "$DS_ENV_FILE"'
    secret = {
        "HF_TOKEN": "hf_0123",
        "HF_HOME": "/h f",
        "GLOO_SOCKET_IFNAME": "eth$9",
        "https_proxy": "http://a:b@c",
        "HOME": str(tmp_path),
    }
    done = started(tmp_path, "deepspeed.sh", "deepspeed", body, **secret)
    assert done.returncode == 0, done.stderr
    command, *lines = done.stdout.splitlines()
    assert "--hostfile" in command and lines[-1] == "MINE=1"
    paths = {"SCRATCH_OF_RUNS=/scratch", "MODELS=/models", "DATA=/data"}
    assert paths | {"HF_HUB_OFFLINE=1", "HF_HOME=/h f"} <= {*lines}
    assert "hf_0123" not in done.stdout and "eth$9" not in done.stdout and "NOT_USED" not in done.stdout
    assert done.stderr.startswith("deepspeed.sh: the other nodes do not get GLOO_SOCKET_IFNAME HF_TOKEN https_proxy: ")
    assert done.stderr.count("\n") == 1


def test_the_quickstart_may_be_called_again(tmp_path):
    """Stubs stand for the installation and the programs; training refuses a folder with checkpoints as the real one."""
    train = 'if [[ -e runs/c && "$*" != *"--resume auto" ]]; then exit 2; fi; mkdir -p runs/c'
    files = {"launch/get_smollm2.sh": "true", "launch/torchrun.sh": train, "bin/python": 'echo "$*"'}
    files["launch/environment.sh"] = f"ROOT={tmp_path} VENV=v; prepare_environment() {{ PATH={tmp_path}/bin:$PATH; }}"
    for name, body in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    script = shutil.copy(ROOT / "launch/quickstart.sh", tmp_path / "launch")
    for _ in range(2):
        done = subprocess.run(["bash", script], capture_output=True, text=True, timeout=30)
        assert done.returncode == 0 and "-m dist_qft generate runs/quickstart/merged.gguf" in done.stdout


@pytest.mark.parametrize(("tool", "code"), [(None, 0), ("ruff", 1), ("mypy", 1), ("pytest", 3)])
def test_the_test_command_ends_with_what_its_tools_found(tmp_path, tool, code):
    """Stubs stand for the tools; mypy runs beside pytest and ends before it."""
    files = dict.fromkeys(("launch/get_smollm2.sh", "bin/ruff", "bin/mypy", "bin/pytest"), "true")
    files["launch/environment.sh"] = f"ROOT={tmp_path}; prepare_environment() {{ PATH={tmp_path}/bin:$PATH; }}"
    files["bin/pytest"] = "sleep 0.2"
    if tool:
        files[f"bin/{tool}"] = f"exit {code}"
    for name, body in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "tests").mkdir()
    script = shutil.copy(ROOT / "tests/run.sh", tmp_path / "tests")
    assert subprocess.run(["bash", script], timeout=30).returncode == code
