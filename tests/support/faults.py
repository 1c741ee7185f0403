"""Faults of a run: moments to wait for, actions on its processes and its files, disks that fail."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from dist_qft.storage.checkpoint import list_checkpoints
from tests.support.commands import Command

MERGED = "merged-dense"

# Called right after the start of a command, whose run may have checkpoints of an earlier one; returns when it is time.
Moment = Callable[[Command, Path, random.Random], None]


def starting(command: Command, run: Path, chance: random.Random) -> None:
    """While ranks import, meet, load and have not taken a step. Only of a run without a folder."""
    command.wait_until(run.exists)
    time.sleep(chance.uniform(0, 0.6))


def stepping(command: Command, run: Path, chance: random.Random) -> None:
    """Anywhere in a step: forward, backward, reduction, update; where the config has it, in an evaluation."""
    before = list_checkpoints(run)[-1:]
    command.wait_until(lambda: list_checkpoints(run)[-1:] != before)
    time.sleep(chance.uniform(0, 0.3))


def saving(command: Command, run: Path, chance: random.Random) -> None:
    """While a checkpoint is written under a temporary name."""
    before = list_checkpoints(run)[-1:]
    command.wait_until(lambda: list_checkpoints(run)[-1:] != before)
    command.wait_until(lambda: any(run.glob(".tmp-checkpoint-*")))


def pruning(command: Command, run: Path, chance: random.Random) -> None:
    """The moment when the oldest checkpoint has just lost its name and is being removed."""
    seen: set[Path] = set()

    def one_is_gone() -> bool:
        there = set(list_checkpoints(run))
        seen.update(there)
        return seen != there

    command.wait_until(one_is_gone)


def merging(command: Command, run: Path, chance: random.Random) -> None:
    """While the merge that ends the run writes, under a temporary name."""
    command.wait_until(lambda: any(run.glob(f".tmp-{MERGED}-*")))


def by_itself(command: Command, run: Path, chance: random.Random) -> None:
    """The fault needs nobody to cause it."""


def kill_first(command: Command) -> None:
    command.rank(0).send_signal(signal.SIGKILL)


def terminate(command: Command) -> None:
    command.process.send_signal(signal.SIGTERM)


def kill_last(command: Command) -> None:
    command.rank(command.ranks - 1).send_signal(signal.SIGKILL)


def terminate_last(command: Command) -> None:
    command.rank(command.ranks - 1).send_signal(signal.SIGTERM)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def nothing(command: Command) -> None:
    pass


NO_MOUNTS = 99  # the exit code of these where a machine has none
# Run in a mount namespace of their own with the run's folder $1 on a disk of $2 bytes, copied to $1.left in the end.
FULL_DISK = """
run=$1 size=$2; shift 2; mkdir -p $run; mount -t tmpfs -o size=$size tmpfs $run || exit 99
"$@"; code=$?; cp -r $run $run.left; exit $code
"""
# ... and with a folder above it, after the second step, that is empty and read-only.
READ_ONLY = """
run=$1; shift 2; mkdir -p $run; mount -t tmpfs tmpfs $run || exit 99
(until [ -d $run/checkpoint-2 ]; do sleep 0.01; done; mount -t tmpfs -o ro tmpfs $run) &
"$@"; code=$?; umount $run; cp -r $run $run.left; exit $code
"""


def on_disk(disk: str | None, run: Path, undisturbed: Path) -> tuple[str, ...]:
    """A prefix that starts a command on a disk of that kind, if any: of room for two checkpoints and a half."""
    if disk is None:
        return ()
    pages = sum(-(-file.stat().st_size // 4096) for file in list_checkpoints(undisturbed)[-1].iterdir())
    return ("unshare", "-rm", "sh", "-c", disk, "sh", str(run), str(int(4096 * (2.5 * pages + 20))))
