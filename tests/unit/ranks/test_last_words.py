"""A rank that ends because of another: a checkpoint that is being written is finished."""

import subprocess
import sys
import time
from threading import Event, Thread

import pytest

from dist_qft.ranks import session
from dist_qft.ranks.session import _finish_writing

PROGRAM = """
import sys, threading, time
from types import SimpleNamespace
from contextlib import contextmanager
import dist_qft.ranks.session as session

@contextmanager
def watch(end):
    threading.Thread(target=end, args=("rank 1 is gone",), daemon=True).start()
    yield

def write():
    time.sleep(1.0)
    open(sys.argv[1], "w").write("whole")

def idle():
    time.sleep(60)

peers = SimpleNamespace(rank=0, world_size=2, doing=lambda: "step 3", watch=watch)
threading.Thread(target=write).start()
threading.Thread(target=idle, daemon=True).start()
with session.errors_reported(peers, None):
    time.sleep(60)
"""


def test_what_a_thread_writes_is_there_when_the_process_has_ended(tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "written")]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert done.returncode == 4 and "rank 1 is gone" in done.stderr
    assert (tmp_path / "written").read_text() == "whole"
    assert time.monotonic() - started < 40


def test_a_thread_that_does_not_end_is_not_waited_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(session, "_WRITING_SECONDS", 0.5)
    over = Event()
    thread = Thread(target=over.wait)
    thread.start()
    started = time.monotonic()
    _finish_writing()
    assert 0.4 < time.monotonic() - started < 5
    over.set()
    thread.join()
