"""A lock says who holds it, outlives kills, and is taken over from the dead alone."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dist_qft.errors import SetupError, UserError
from dist_qft.storage import lock as lock_module
from dist_qft.storage.lock import STALE_SECONDS, FolderLock, locked
from dist_qft.storage.owner import Owner

HOLD = "import sys; from pathlib import Path; from dist_qft.storage.lock import FolderLock; "
HOLD += "FolderLock.acquire(Path(sys.argv[1]), 'x'); print('held', flush=True); sys.stdin.read()"
WHAT = "output_dir: 'a'"


@contextmanager
def held_by_another_process(path: Path) -> Iterator[subprocess.Popen]:
    words = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def move_to_another_machine(path: Path, age: float = 0.0) -> None:
    """Make a lock look like one of a process elsewhere that touched it `age` seconds ago."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "owner": str(Owner("0" * 8, "0" * 8, 7, 7)), "host": "node7", "pid": 7}))
    os.utime(path, (time.time() - age,) * 2)


def test_a_held_lock_names_its_holder(tmp_path):
    path = tmp_path / "run.lock"
    with held_by_another_process(path) as process:
        with pytest.raises(UserError) as refusal:
            FolderLock.acquire(path, WHAT)
        assert refusal.value.exit_code == 2
        text = str(refusal.value)
        assert text.startswith(f"{WHAT}: it is in use by process {process.pid} on ") and f"remove '{path}'" in text
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(UserError, match="in use by"):
            FolderLock.acquire(path, WHAT)


def test_a_killed_holder_is_taken_over_at_once(tmp_path):
    path = tmp_path / "run.lock"
    with held_by_another_process(path) as process:
        process.kill()
        process.wait()
        assert path.exists()
        lock = FolderLock.acquire(path, WHAT)
        lock.require_held()
        assert json.loads(path.read_text())["pid"] == os.getpid()
        lock.release()
    assert list(tmp_path.iterdir()) == []


def test_only_one_of_many_takes_a_dead_lock_over(tmp_path):
    path = tmp_path / "run.lock"
    for _ in range(5):
        with held_by_another_process(path) as process:
            process.kill()
            process.wait()
        winners, refused = [], []

        def start(winners=winners, refused=refused) -> None:
            try:
                winners.append(FolderLock.acquire(path, WHAT))
            except UserError as error:
                refused.append(error)

        threads = [threading.Thread(target=start) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        holders = []
        for winner in winners:
            try:
                winner.require_held()
                holders.append(winner)
            except SetupError:
                pass
        assert len(holders) == 1 and len(refused) + len(winners) == 8
        for winner in winners:
            winner.release()
        assert not path.exists()


def test_a_holder_elsewhere_counts_as_gone_once_it_is_silent_for_long(tmp_path, monkeypatch, capsys):
    path = tmp_path / "run.lock"
    FolderLock.acquire(path, WHAT)
    move_to_another_machine(path, age=STALE_SECONDS + 1)
    lock = FolderLock.acquire(path, WHAT)
    lock.require_held()

    monkeypatch.setattr(lock_module, "STALE_SECONDS", 3.0)
    monkeypatch.setattr(lock_module, "_TELL_SECONDS", 1.0)
    move_to_another_machine(path, age=0.5)
    with pytest.raises(SetupError, match=r"process 7 on node7 since .* has taken the lock over"):
        lock.require_held()
    started = time.monotonic()
    again = FolderLock.acquire(path, WHAT)
    assert 1.5 < time.monotonic() - started < 10
    assert f"{WHAT}: waiting for process 7 on node7 since " in capsys.readouterr().err
    lock.release()
    again.require_held()
    again.release()


def test_a_holder_elsewhere_that_gives_signs_of_life_keeps_its_lock(tmp_path):
    path = tmp_path / "run.lock"
    FolderLock.acquire(path, WHAT)
    move_to_another_machine(path, age=30)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.3):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="in use by process 7 on node7"):
            FolderLock.acquire(path, WHAT)
    finally:
        stop.set()
        thread.join()


def test_a_holder_elsewhere_that_falls_silent_while_one_waits_counts_as_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "STALE_SECONDS", 3.0)
    path = tmp_path / "key.lock"
    FolderLock.acquire(path, WHAT)
    move_to_another_machine(path, age=2)
    beats = threading.Timer(1.0, os.utime, (path,))
    beats.start()
    started = time.monotonic()
    with locked(path, WHAT, wait_seconds=math.inf):
        assert 3.5 < time.monotonic() - started < 20
    beats.join()


def test_a_wait_for_a_lock_says_for_whom_and_ends(tmp_path, monkeypatch, capsys):
    path = tmp_path / "key.lock"
    monkeypatch.setattr(lock_module, "_TELL_SECONDS", 0.5)
    with held_by_another_process(path) as process:
        with pytest.raises(SetupError) as refusal, locked(path, "data.cache_dir", wait_seconds=1.5):
            pytest.fail("it is held")
        assert refusal.value.exit_code == 3
        assert f"in use by process {process.pid} on " in str(refusal.value) and "still after 1.5 s" in str(
            refusal.value
        )
        assert capsys.readouterr().err.count(f"data.cache_dir: waiting for process {process.pid} on ") == 1
        process.stdin.close()
        process.wait()
        with locked(path, "data.cache_dir", wait_seconds=1.5):
            assert path.exists()
    assert not path.exists()


def test_a_lock_file_that_somebody_removed_is_made_again(tmp_path):
    path = tmp_path / "run.lock"
    lock = FolderLock.acquire(path, WHAT)
    path.unlink()
    lock.require_held()
    assert path.exists()
    lock.release()


@pytest.mark.parametrize("content", ["", "{", '{"owner": "a"}', None])
def test_a_lock_file_that_cannot_be_read_stops_its_owner(tmp_path, monkeypatch, content):
    monkeypatch.setattr(lock_module, "_RETURN_SECONDS", 0.2)
    path = tmp_path / "run.lock"
    lock = FolderLock.acquire(path, WHAT)
    path.unlink()
    path.mkdir() if content is None else path.write_text(content)
    with pytest.raises(SetupError) as refusal:
        lock.require_held()
    assert str(refusal.value).startswith(f"{path}: ") and "\n" not in str(refusal.value)
    lock.release()
    assert path.exists()


def test_a_file_that_is_no_lock_is_not_taken_for_a_dead_one_at_once(tmp_path, monkeypatch):
    path = tmp_path / "run.lock"
    path.write_text("{")
    monkeypatch.setattr(lock_module, "STALE_SECONDS", 1.0)
    lock = FolderLock.acquire(path, WHAT)
    lock.require_held()
    lock.release()


def test_where_no_file_can_be_made_the_reason_is_told(tmp_path):
    with pytest.raises(SetupError, match=r"run.lock: cannot write: No such file or directory") as refusal:
        FolderLock.acquire(tmp_path / "absent" / "run.lock", WHAT)
    assert refusal.value.exit_code == 3
