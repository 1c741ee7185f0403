"""Disks that are full, out of inodes or read-only, for runs and merges: one line, the code of a bad disk, nothing torn.

The disk is a tmpfs of its own that only the attempt sees, so this needs the right to mount (root, in a container too).
"""

import ctypes
import os
import random
import shutil
import tempfile
import time
from pathlib import Path

from dist_qft.storage.checkpoint import fault_in, list_checkpoints
from tests.whole.breaking.attempts import Breaker, Budget, Tally
from tests.whole.breaking.attempts import fault_in as ending_fault
from tests.whole.breaking.children import command, forked
from tests.whole.breaking.workshop import Workshop

_CLONE_NEWNS, _MS_REC, _MS_PRIVATE, _MS_RDONLY, _MS_REMOUNT = 0x20000, 16384, 1 << 18, 1, 32
_SLACK_BYTES = 1 << 30
_ALLOWED = (0, 3)
_COPY_SECONDS = 60.0


def can_mount() -> bool:
    """True if this user may mount a disk that other processes do not see."""
    with tempfile.TemporaryDirectory() as folder:
        return forked(lambda: _mount(Path(folder), "size=64k")).code == 0


def disk_filler(shop: Workshop) -> Breaker:
    """Attempts on disks of sizes and inode counts of chance."""

    def attempt_all(budget: Budget) -> Tally:
        tally = Tally("full, inode-less or read-only disk")
        for number, chance in budget.each():
            with tempfile.TemporaryDirectory(prefix="breaking-") as folder:
                outcome, reason = _attempt(shop, Path(folder), chance)
            tally.outcomes[outcome] += 1
            if reason is not None:
                tally.fail(f"{budget.seed}:{number} ({outcome})", reason)
        return tally

    return attempt_all


def _attempt(shop: Workshop, folder: Path, chance: random.Random) -> tuple[str, str | None]:
    disk, copy = folder / "disk", folder / "copy"
    disk.mkdir()
    kind = chance.choice(("full", "full", "full", "no inodes", "no inodes", "read-only"))
    options = {
        "full": f"size={4096 * chance.randint(1, 220)}",
        "no inodes": f"size=64m,nr_inodes={chance.randint(2, 60)}",
        "read-only": "size=64m,ro",
    }[kind]
    run = disk / "run"
    if chance.random() < 0.6:
        words: tuple[object, ...] = ("train", shop.config, f"output_dir={run}")
    else:
        target = chance.choice(("dense", "peft"))
        words = ("merge", shop.run, "--to", target, "-o", run / "merged")
    ended = command(*words, prepare=lambda: _watched(disk, copy, options), cpu_seconds=60)
    outcome = f"{kind}, {words[0]}: code {ended.code}"
    if reason := ending_fault(ended, shop.peak_bytes + _SLACK_BYTES):
        return outcome, reason
    if ended.code not in _ALLOWED:
        return outcome, f"code {ended.code}, must be {_ALLOWED}: {ended.last_line}"
    deadline = time.monotonic() + _COPY_SECONDS
    while not _marker(copy).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    left = [path for path in copy.rglob("*") if path.name.startswith(".tmp-")]
    torn = [path for path in list_checkpoints(copy / "run") if fault_in(path)]
    if left or torn:
        return outcome, f"left over {[path.name for path in left]}, torn {[path.name for path in torn]}"
    return outcome, None


def _watched(disk: Path, copy: Path, options: str) -> None:
    """Mount the disk for this process, and have a second one copy what is on it when this one has ended."""
    _mount(disk, options)
    reader, writer = os.pipe()
    os.set_inheritable(writer, False)
    if os.fork() == 0:
        try:
            os.setsid()  # or it would be ended with the command
            os.close(writer)
            os.read(reader, 1)  # ends when the command has closed its end
            shutil.copytree(disk, copy, dirs_exist_ok=True)
            _marker(copy).touch()
        finally:
            os._exit(0)
    os.close(reader)


def _marker(copy: Path) -> Path:
    """A file that says that the copy is whole."""
    return copy.with_name("copied")


def _mount(disk: Path, options: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    flags = _MS_RDONLY if options.endswith(",ro") else 0
    data = options.removesuffix(",ro").encode()
    for call, arguments in (
        (libc.unshare, (_CLONE_NEWNS,)),
        (libc.mount, (b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)),
        (libc.mount, (b"tmpfs", os.fsencode(disk), b"tmpfs", ctypes.c_ulong(flags), data)),
    ):
        if call(*arguments) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
