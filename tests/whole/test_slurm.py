"""The batch scripts on a real Slurm of two nodes: training, and all that can end a job before its time."""

import json
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path

import psutil
import pytest

from dist_qft.config.load import load_config, save_config
from dist_qft.storage.checkpoint import fault_in, list_checkpoints, read_checkpoint
from tests.support.fault_ranks import fault_ranks
from tests.support.rank_pool import RankPool
from tests.support.slurm_cluster import SlurmCluster, missing
from tests.support.study_files import write_study
from tests.support.tiny_model import tiny_config
from tests.support.whole_runs import adapter_digest, train_only

REPOSITORY = Path(__file__).parents[2]
STEPS = 100
RANKS = fault_ranks()  # half of them on each node: one, or a whole group with DIST_QFT_TEST_GROUP=2
# The scripts' own headers ask for two on each, which some tests below leave as it is.
PER_NODE = f"--ntasks-per-node={RANKS.count // 2}"

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    cluster = SlurmCluster(folder)
    cluster.start()
    yield cluster
    cluster.stop()
    shutil.rmtree(folder, ignore_errors=True)


class Job:
    """A submitted batch script; its logs and its run are in `folder`."""

    def __init__(
        self, cluster: SlurmCluster, folder: Path, *words: str, script: str = "slurm/train.sbatch", **variables: str
    ) -> None:
        self.cluster, self.folder = cluster, folder
        self.run_dir = folder / "run"
        ours = {"VIRTUAL_ENV": sys.prefix, "PYTHONPATH": str(REPOSITORY), "LOGS": str(folder / "logs")}
        options = list(takewhile(lambda word: word.startswith("--"), words))
        rest = words[len(options) :]
        submit = ["sbatch", "--parsable", f"--output={folder}/slurm.out", *options, script, *rest]
        self.number = cluster.run(*submit, env={**ours, "OMP_NUM_THREADS": "1", **variables}, cwd=REPOSITORY)

    def await_checkpoint(self, step: int) -> None:
        deadline = time.monotonic() + 120
        while not any(int(path.name.split("-")[1]) >= step for path in list_checkpoints(self.run_dir)):
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.02)

    def finish(self, *states: str) -> dict[str, str]:
        return self.cluster.wait(self.number, *states)

    def output(self) -> str:
        return (self.folder / "slurm.out").read_text()

    def attempts(self) -> list[int]:
        records = (self.folder / "logs" / self.number / "attempts").read_text()
        return [int(code) for code in re.findall(r"exit code (\d+)", records)]


@pytest.fixture(scope="module")
def config(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slurm")
    train = {"max_steps": STEPS, "global_batch_size": 2 * RANKS.count}
    sections = {"train": train, "checkpoint": {"save_steps": 5, "save_total_limit": 100}, "sharding": RANKS.sharding()}
    save_config(tiny_config(tiny_llama, folder / "run", **sections), folder / "run.yaml")
    return folder / "run.yaml"


@pytest.fixture(scope="module")
def undisturbed(pools: dict[int, RankPool], config: Path) -> tuple[str, str]:
    """Digest of the final adapter and history of the same config without launcher and Slurm."""
    pools[RANKS.count].run(train_only, config=load_config(config))
    return digest_and_history(config.parent / "run")


def digest_and_history(run_dir: Path) -> tuple[str, str]:
    assert all(fault_in(path) is None for path in list_checkpoints(run_dir))
    return adapter_digest(run_dir), read_checkpoint(list_checkpoints(run_dir)[-1]).state.history_digest


def require_complete(job: Job, undisturbed: tuple[str, str], attempts: list[int]) -> None:
    """The job has ended with the undisturbed adapter and history, after attempts with these exit codes."""
    state = job.finish()
    assert (state["JobState"], state["ExitCode"]) == ("COMPLETED", "0:0"), job.output()
    assert (job.attempts(), state["Restarts"]) == (attempts, str(len(attempts) - 1)), job.output()
    assert digest_and_history(job.run_dir) == undisturbed
    assert json.loads((job.run_dir / "summary.json").read_text())["world_size"] == RANKS.count


def require_saved(job: Job, first: int) -> int:
    """The job waits to run again, and has said that it saved a step from `first` on: that step."""
    job.cluster.wait(job.number, "PENDING")
    saved = read_checkpoint(list_checkpoints(job.run_dir)[-1]).state.step
    assert first <= saved < STEPS
    assert f"error: stopped by a signal after step {saved}, which is saved" in job.output()
    return saved


def test_what_ends_a_torchrun_job_before_its_time_changes_no_bit(cluster, config, undisturbed, tmp_path):
    """One job is requeued, then warned as before its time limit, then ends."""
    job = Job(cluster, tmp_path, PER_NODE, str(config), f"output_dir={tmp_path}/run", STARTER="torchrun")
    job.await_checkpoint(10)
    cluster.run("scontrol", "requeue", job.number)
    saved = require_saved(job, 10)
    job.await_checkpoint(saved + 5)
    cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    require_saved(job, saved + 5)
    require_complete(job, undisturbed, [75, 75, 0])
    logs = tmp_path / "logs" / job.number / "attempt-2"
    told = [f"[default0]:step {STEPS}/{STEPS}" in path.read_text() for path in sorted(logs.glob("task-*.log"))]
    assert told == [True, False]
    assert len(list(logs.glob("node-?/*/attempt_0/?/stderr.log"))) == RANKS.count, "one log per rank"


def test_a_job_of_sruns_own_ranks_saves_on_a_signal_and_goes_on(cluster, config, undisturbed, tmp_path):
    job = Job(cluster, tmp_path, PER_NODE, str(config), f"output_dir={tmp_path}/run", STARTER="srun")
    job.await_checkpoint(10)
    cluster.run("scancel", "--signal=TERM", job.number)
    require_saved(job, 10)
    require_complete(job, undisturbed, [75, 0])
    assert len(list((tmp_path / "logs" / job.number / "attempt-1").glob("task-*.log"))) == RANKS.count


def test_every_warning_reaches_the_ranks(cluster, tmp_path):
    """Slurm sends CONT right before its warning, and bash 5.2's `wait` loses the second of one such pair in ten."""
    rank = "trap 'echo warned' USR1; echo ready; while :; do sleep 0.05; done"
    script = tmp_path / "job.sbatch"
    script.write_text(f'#!/usr/bin/env bash\nsource slurm/job.sh\nrun_step --ntasks=1 bash -c "{rank}"\n')
    job = Job(cluster, tmp_path, "--nodes=1", "--job-name=warned", script=str(script))
    log = tmp_path / "logs" / job.number / "attempt-0" / "task-0.log"

    def await_line(number: int) -> None:
        deadline = time.monotonic() + 30
        while not log.exists() or log.read_text().count("\n") < number:
            assert time.monotonic() < deadline, f"warning {number - 1} was lost"
            time.sleep(0.02)

    await_line(1)
    batch = process_of(job, lambda each: each.cmdline()[-1].endswith("/slurm_script"))
    for warning in range(20):
        batch.send_signal(signal.SIGCONT)
        batch.send_signal(signal.SIGUSR1)
        await_line(warning + 2)
    cluster.run("scancel", job.number)
    job.finish()


def test_a_warned_row_of_an_array_is_requeued_alone(cluster, tmp_path):
    """Slurm gives the last row the array's own number: by it, all rows would be warned, and none requeued."""
    rank = "trap 'exit 75' USR1; [[ $attempt == 0 ]] || exit 0; echo ready; while :; do sleep 0.05; done"
    script = tmp_path / "job.sbatch"
    lines = [
        "#!/usr/bin/env bash",
        "source slurm/job.sh",
        "export attempt",
        f"run_step --ntasks=1 bash -c {shlex.quote(rank)}",
    ]
    script.write_text("\n".join([*lines, "[[ $code != 75 ]] || requeue", "exit $code"]) + "\n")
    options = ("--array=0-1", "--nodes=1", "--ntasks=1", "--requeue", "--open-mode=append", "--job-name=row")
    array = Job(cluster, tmp_path, *options, script=str(script))
    logs = [tmp_path / "logs" / f"{array.number}_{row}" / "attempt-0" / "task-0.log" for row in range(2)]
    deadline = time.monotonic() + 30
    while not all(log.exists() and log.read_text() for log in logs):
        assert time.monotonic() < deadline, array.output()
        time.sleep(0.05)
    assert cluster.job(f"{array.number}_1")["JobId"] == array.number
    cluster.run("scancel", "--batch", "--signal=USR1", f"{array.number}_1")
    state = cluster.wait(f"{array.number}_1")
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), array.output()
    assert cluster.job(f"{array.number}_0")["JobState"] == "RUNNING", array.output()
    cluster.run("scancel", array.number)


def test_scancel_saves_and_is_the_end(cluster, config, tmp_path):
    """Of a job of the size that the script's own header asks for: two ranks on each of two nodes."""
    words = ["train.max_steps=5000", "train.global_batch_size=8"]
    job = Job(cluster, tmp_path, str(config), f"output_dir={tmp_path}/run", *words)
    job.await_checkpoint(5)
    cluster.run("scancel", job.number)
    state = job.finish()
    assert (state["JobState"], state["Restarts"]) == ("CANCELLED", "0")
    assert job.attempts() == [75]
    assert "Slurm cancels or requeues this job by itself" in job.output()
    logs = tmp_path / "logs" / job.number / "attempt-0"
    assert len(list(logs.glob("node-?/*/attempt_0/?/stderr.log"))) == 4, "one log per rank"
    assert "4 ranks" in (logs / "task-0.log").read_text()


def process_of(job: Job, wanted: Callable[[psutil.Process], bool]) -> psutil.Process:
    for process in psutil.process_iter():
        try:
            if process.environ().get("SLURM_JOB_ID") == job.number and wanted(process):
                return process
        except psutil.Error:
            continue
    raise AssertionError(f"no such process of job {job.number}")


def test_a_mistake_is_not_tried_again_and_other_failures_only_so_often(cluster, config, tmp_path):
    (tmp_path / "typo").mkdir()
    typo = Job(cluster, tmp_path / "typo", PER_NODE, str(config), "train.learning_rat=1")
    state = typo.finish()
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", "2:0", "0")
    told = "error: command line: train.learning_rat=1: unknown key 'train.learning_rat'"
    assert told in typo.output() and "trying again would not help" in typo.output()

    # A program in the place of Python: what counts is its code, and that of a real rank comes after seconds.
    program = tmp_path / "bin" / "python"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "error: rank $SLURM_PROCID: no space left" >&2\nexit 3\n')
    program.chmod(0o755)
    job = Job(cluster, tmp_path, str(config), STARTER="srun", MAX_FAILURES="2", VIRTUAL_ENV=str(tmp_path))
    state = job.finish()
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", "3:0", "1")
    assert "2 attempts failed, the last with exit code 3: giving up" in job.output()
    assert [line for line in job.output().splitlines() if "no space left" in line] == [
        f"error: rank {rank}: no space left" for _ in range(2) for rank in range(4)
    ]


def test_an_array_study_runs_two_rows_at_a_time_and_a_failed_row_stops_no_other(cluster, tiny_llama, tmp_path):
    axes = {"train.learning_rate": [1e-3, 1e30, 2e-3]}  # the second one ends in numbers that are not finite
    study = write_study(
        tmp_path, tiny_llama, axes=axes, presets=None, seeds=[0], train={"max_steps": 3, "max_grad_norm": None}
    )
    array = Job(cluster, tmp_path, "--array=0-2%2", str(study), script="slurm/study.sbatch")
    report = Job(
        cluster, tmp_path, f"--dependency=afterany:{array.number}", str(study), "--report", script="slurm/study.sbatch"
    )
    most = 0
    while cluster.job(report.number)["JobState"] == "PENDING":
        running = cluster.run(
            "squeue", "-h", "-r", "-t", "RUNNING", "-j", array.number, "-o", "%K", check=False
        ).split()
        most = max(most, len(running))
        time.sleep(0.1)
    assert report.finish()["JobState"] == "COMPLETED", report.output()
    assert most == 2
    states = [cluster.job(f"{array.number}_{row}") for row in range(3)]
    assert [state["JobState"] for state in states].count("COMPLETED") == 2
    assert [state["ExitCode"] for state in states].count("6:0") == 1
    assert "Runs that failed" in (tmp_path / "out" / "report" / "report.html").read_text()
