"""A process that dies at any moment of a save: no checkpoint is lost, and none is half there."""

import os
import shutil
import signal
import sys
from collections.abc import Callable

from dist_qft.storage.checkpoint import OPTIMIZER, clean_up, fault_in, list_checkpoints, prune
from dist_qft.training.resume import choose_checkpoint
from tests.support.checkpoints import flip_a_bit
from tests.support.checkpoints import save_small_checkpoint as save

# What a save does to the disk, as the interpreter calls it: a kill just before any of these is a kill point.
DISK_CALLS = {"open", "write", "flush", "close", "fsync", "mkdir", "rename", "unlink", "rmdir", "replace"}


def in_a_fork(action: Callable[[], None], kill_at: int) -> tuple[int, int]:
    """Run `action` in a child that SIGKILLs itself before its `kill_at`-th call that touches the disk.

    Returns the calls made and the child's wait status. No hook in our code: the interpreter's own profiling does it.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        calls = 0

        def count(_frame: object, event: str, function: object) -> None:
            nonlocal calls
            if event == "c_call" and getattr(function, "__name__", "") in DISK_CALLS:
                if calls == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                calls += 1

        code = 1
        sys.setprofile(count)
        try:
            action()
            code = 0
        finally:
            sys.setprofile(None)
            os.write(writer, calls.to_bytes(4, "little"))
            os._exit(code)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    calls = int.from_bytes(os.read(reader, 4), "little")
    os.close(reader)
    return calls, status


def test_killed_at_any_moment_of_a_save_no_checkpoint_is_lost(tmp_path):
    run_dir = tmp_path / "run"
    for step in (1, 2):
        save(run_dir, step)
    flip_a_bit(save(run_dir, 3) / OPTIMIZER)  # a torn one stands where the save wants to publish

    def save_and_prune() -> None:
        save(work, 3)
        prune(work, keep=2)

    work = tmp_path / "counted"
    shutil.copytree(run_dir, work)
    moments, status = in_a_fork(save_and_prune, kill_at=-1)
    assert status == 0 and moments > 40
    outcomes = set()
    for moment in range(moments):
        work = tmp_path / f"killed-{moment}"
        shutil.copytree(run_dir, work)
        _, status = in_a_fork(save_and_prune, kill_at=moment)
        assert os.WTERMSIG(status) == signal.SIGKILL
        valid = [int(path.name[-1]) for path in list_checkpoints(work) if fault_in(path) is None]
        torn = [int(path.name[-1]) for path in list_checkpoints(work) if fault_in(path) is not None]
        assert valid in ([1, 2], [1, 2, 3], [2, 3]), f"after a kill at {moment}"
        assert torn in ([], [3]) and (3 not in valid or not torn)
        outcomes.add(tuple(valid))
        checkpoint, _ = choose_checkpoint(work, "auto")
        assert checkpoint.state.step == valid[-1]
        clean_up(work)  # as the next start does
        assert not list(work.glob(".tmp-*"))
        save(work, 3)
        assert fault_in(work / "checkpoint-3") is None
    assert outcomes == {(1, 2), (1, 2, 3), (2, 3)}
