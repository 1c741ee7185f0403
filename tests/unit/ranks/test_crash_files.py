"""The files for stacks of fatal signals: gone after a good end, and of killed ranks at the next start."""

import faulthandler
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dist_qft.ranks.crash import CRASH_FOLDER, crash_report, remove_empty_reports

_DIE = "import os, signal; os.kill(os.getpid(), signal.{name})"
_PROGRAM = """
import sys
from pathlib import Path
from dist_qft.ranks.crash import crash_report
with crash_report(Path(sys.argv[1]), 1, 4, lambda: "test"):
    {action}
"""


def _run(folder: Path, action: str) -> subprocess.Popen:
    command = [sys.executable, "-c", _PROGRAM.format(action=action), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


@pytest.fixture
def without_faulthandler():
    """pytest's own handler would keep ours from starting."""
    enabled = faulthandler.is_enabled()
    faulthandler.disable()
    yield
    if enabled:
        faulthandler.enable()


def test_empty_files_of_killed_ranks_go_at_the_next_start_and_no_others(tmp_path, without_faulthandler):
    crash = tmp_path / CRASH_FOLDER
    assert _run(tmp_path, _DIE.format(name="SIGKILL")).wait() == -signal.SIGKILL
    assert [path.name for path in crash.iterdir()] == ["rank-1.fatal.txt"]
    living = _run(tmp_path, 'print("here", flush=True); import time; time.sleep(600)')
    try:
        living.stdout.readline()
        (crash / "rank-2.fatal.txt").touch()  # of a rank that the next start does not have
        (crash / "rank-3.fatal.txt").write_text("a stack")
        (crash / "rank-mine.fatal.txt").touch()
        with crash_report(tmp_path, 1, 2, lambda: "test"):  # beside a program that lives and has the same rank
            names = {path.name for path in crash.iterdir()}
            assert names == {
                "rank-1.fatal.txt", f"rank-1-{os.getpid()}.fatal.txt", "rank-3.fatal.txt", "rank-mine.fatal.txt"
            }  # fmt: skip
        assert (crash / "rank-1.fatal.txt").exists()
    finally:
        living.kill()
        living.wait()
    remove_empty_reports(crash)
    assert {path.name for path in crash.iterdir()} == {"rank-3.fatal.txt", "rank-mine.fatal.txt"}


def test_a_fatal_signal_leaves_its_stack(tmp_path):
    assert _run(tmp_path, _DIE.format(name="SIGSEGV")).wait() == -signal.SIGSEGV
    remove_empty_reports(tmp_path / CRASH_FOLDER)
    assert "Segmentation fault" in (tmp_path / CRASH_FOLDER / "rank-1.fatal.txt").read_text()
