"""The launcher with real processes: what reaches the shell when ranks end, fail, are killed or are told to stop.

A small module stands in for `dist_qft` as what the ranks run; all else is what users start.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dist_qft.launch.command import _parse, main
from dist_qft.ranks.preemption import SAVE_SECONDS
from tests.support.commands import launcher_of
from tests.support.launched_ranks import RANKS


@pytest.fixture
def start(tmp_path: Path):
    """Starts the launcher with two ranks; ends what a failed test left behind."""
    (tmp_path / "ranks.py").write_text(RANKS)
    env = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "RANK", "WORLD_SIZE")}
    launcher, variables = launcher_of("ranks", tmp_path)
    env |= variables
    started: list[subprocess.Popen[str]] = []

    def popen(*arguments: str, ignored: tuple[signal.Signals, ...] = (), **variables: str) -> "subprocess.Popen[str]":
        command = [*launcher, "--nproc-per-node", "2", *arguments]
        ignore = f"trap '' {' '.join(number.name for number in ignored)};" if ignored else ""
        command = ["bash", "-c", f'{ignore} exec "$@"', "bash", *command]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, env=env | variables, text=True, **pipes)
        started.append(process)
        return process

    yield popen
    for process in started:
        process.kill()


def await_ranks(launcher: "subprocess.Popen[str]") -> None:
    assert [launcher.stdout.readline() for _ in range(2)] == ["waiting\n"] * 2


def test_ranks_meet_and_success_is_silent(start) -> None:
    launcher = start("--", "meet", "--resume", "auto")
    output, errors = launcher.communicate(timeout=90)
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert output.splitlines() == [f"torchrun True 11.0 {threads} ['--resume', 'auto']"] * 2
    assert errors == ""
    assert launcher.returncode == 0


def test_code_of_the_rank_that_failed_and_not_of_its_peer_reaches_the_shell(start) -> None:
    """Rank 1 fails with 6, so rank 0 loses its peer and ends with 4; rank 1's message is the last word.

    PYTHON_EXEC has the ranks started afresh, as on GPUs; in the other tests they are forked.
    """
    launcher = start("--", "fail", PYTHON_EXEC=sys.executable)
    _, errors = launcher.communicate(timeout=90)
    assert errors.splitlines() == ["out of luck"]
    assert launcher.returncode == 6


def test_killed_rank_is_named(start) -> None:
    launcher = start("--", "fall")
    _, errors = launcher.communicate(timeout=90)
    assert errors.splitlines() == ["dist_qft.launch: rank 1 was killed by SIGKILL"]
    assert launcher.returncode == 128 + signal.SIGKILL


def test_what_all_ranks_refuse_is_told_once_however_late_the_first_rank_is(start) -> None:
    launcher = start("--max-restarts", "3", "--", "refuse")  # which a mistake does not use
    _, errors = launcher.communicate(timeout=60)
    assert errors == "error: no such file\n"
    assert launcher.returncode == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_an_interrupt_and_a_closed_terminal_have_the_ranks_save(start, number) -> None:
    launcher = start("--", "save on")
    await_ranks(launcher)
    launcher.send_signal(number)
    _, errors = launcher.communicate(timeout=30)
    assert launcher.returncode == 75
    assert ("Ctrl-C again within 3 s" in errors) == (number == signal.SIGINT)


def test_a_second_interrupt_kills_the_ranks(start) -> None:
    launcher = start("--max-restarts", "2", "--", "deaf")
    await_ranks(launcher)
    for _ in range(2):
        launcher.send_signal(signal.SIGINT)
        time.sleep(0.5)
    _, errors = launcher.communicate(timeout=30)
    assert launcher.returncode == 128 + signal.SIGINT
    assert "interrupted twice" in errors and "starting again" not in errors


def test_a_signal_ignored_at_the_start_stays_ignored_and_another_has_the_ranks_save(start) -> None:
    launcher = start("--max-restarts", "3", "--", "save", ignored=(signal.SIGHUP,))  # a signal uses no restart
    await_ranks(launcher)
    for process in (launcher, *psutil.Process(launcher.pid).children()):
        process.send_signal(signal.SIGHUP)
    time.sleep(1.0)
    assert launcher.poll() is None
    launcher.send_signal(signal.SIGTERM)
    _, errors = launcher.communicate(timeout=30)
    assert errors == ""
    assert launcher.returncode == 75


def test_a_single_node_listens_on_loopback_only_and_its_ranks_end_with_the_launcher(start) -> None:
    launcher = start("--", "listen")
    await_ranks(launcher)
    ranks = psutil.Process(launcher.pid).children()
    assert len(ranks) == 2
    family = [psutil.Process(launcher.pid), *ranks]
    listening = [c.laddr.ip for p in family for c in p.net_connections() if c.status == psutil.CONN_LISTEN]
    assert listening and set(listening) == {"127.0.0.1"}
    launcher.kill()
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert not alive


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_a_signal_ends_a_node_that_waits_for_the_others(start) -> None:
    """Its ranks, which are there already and wait too, keep neither it nor themselves alive."""
    launcher = start("--nnodes", "2", "--master-port", free_port(), "--", "save")
    node = psutil.Process(launcher.pid)
    while not any(c.status == psutil.CONN_LISTEN for c in node.net_connections()):
        assert launcher.poll() is None
        time.sleep(0.05)
    ranks = node.children()
    launcher.send_signal(signal.SIGTERM)
    _, errors = launcher.communicate(timeout=30)
    assert (launcher.returncode, errors) == (75, "error: stopped by a signal before the run began; start it again\n")
    assert psutil.wait_procs(ranks, timeout=10)[1] == []


def test_a_killed_rank_restarts_the_ranks_of_all_nodes(start, tmp_path) -> None:
    """Two launchers stand for two nodes; rank 1 of the first one is killed, and both start their ranks again."""
    options = ["--nproc-per-node", "2", "--nnodes", "2", "--master-port", free_port(), "--max-restarts", "2"]
    nodes = [start(*options, "--node-rank", n, "--", "die once", str(tmp_path / "died")) for n in ("0", "1")]
    outputs = [node.communicate(timeout=120) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    for number, (output, _) in enumerate(outputs):
        lines = output.splitlines()
        assert sum(line.startswith("rank ") for line in lines) == 4, "both ranks of each node started twice"
        done = sorted(line for line in lines if line.startswith("done"))
        assert done == [f"done {2 * number}", f"done {2 * number + 1}"]
    assert "rank 1 was killed by SIGKILL; starting again" in outputs[0][1]


@pytest.mark.parametrize("waits", ["save", "deaf"])
def test_a_node_whose_ranks_wait_for_one_that_failed_did_not_end_by_a_signal(start, waits) -> None:
    """Exit code 75 would have a job start again for ever. Ranks that wait in C do not hear of it, and are killed."""
    port = free_port()
    nodes = [
        start("--nnodes", "2", "--master-port", port, "--node-rank", str(rank), "--", what)
        for rank, what in enumerate((waits, "refuse late"))
    ]
    outputs = [node.communicate(timeout=120) for node in nodes]
    assert [node.returncode for node in nodes] == [4, 3], outputs
    assert outputs[0][1].startswith("dist_qft.launch: another node has ended the run\n")


def test_ranks_have_the_time_of_a_long_step_and_save_to_leave(monkeypatch) -> None:
    monkeypatch.delenv("PET_SHUTDOWN_TIMEOUT", raising=False)
    assert _parse(["--", "train"], "dist_qft").shutdown_timeout == SAVE_SECONDS == 3600


def test_ranks_that_do_not_leave_are_killed(start) -> None:
    launcher = start("--shutdown-timeout", "1", "--", "deaf")
    await_ranks(launcher)
    launcher.send_signal(signal.SIGUSR1)
    _, errors = launcher.communicate(timeout=30)
    killed, named = errors.splitlines()
    assert killed == "dist_qft.launch: killing the ranks still there after 1 s of grace"
    assert named in [f"dist_qft.launch: rank {rank} was killed by SIGKILL" for rank in (0, 1)]
    assert launcher.returncode == 128 + signal.SIGKILL


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["config.yaml", "--", "train"], "unexpected argument 'config.yaml' before '--'; usage: python -m dist_qft"),
        (
            ["--nproc-per-node", "0", "--", "train"],
            "--nproc-per-node: got 0, --nnodes: got 1:1, must be at least 1 each",
        ),
        (["--nproc-per-node", "two", "--", "train"], "Unsupported nproc_per_node value: two"),
        (["--nnodes", "2:1", "--", "train"], "--nnodes: got 2:1, must be at least 1 each"),
        (["--nnodes", "2", "--node-rank", "2", "--", "train"], "--node-rank: got 2, must be 0 to 1"),
        (["--nnodes", "1:2:3", "--", "train"], 'nnodes=1:2:3 is not in "MIN:MAX" format'),
        (["--signals-to-handle", "SIGTERM,SIGFOO", "--", "train"], "there is no signal 'SIGFOO'"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(arguments: list[str], message: str, capfd) -> None:
    assert main(arguments) == 2
    errors = capfd.readouterr().err
    assert errors.startswith("dist_qft.launch: ")
    assert message in errors
    assert errors.count("\n") == 1


def test_dry_run_asks_rank_0_of_the_whole_world(start) -> None:
    launcher = start("--nnodes", "4", "--", "train", "--dry-run")
    output, _ = launcher.communicate(timeout=60)
    assert output.splitlines()[1:] == ["rank 0 of 8"]
    assert launcher.returncode == 0
