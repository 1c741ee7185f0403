"""Crash reports: `<output_dir>/crash/rank-<r>.txt`, written by a rank that fails.

Written for lost peers, for memory that ran out, for bugs of ours, and by Python's faulthandler for signals such as
SIGSEGV; not for mistakes of the user, which their message explains.
"""

import contextlib
import faulthandler
import fcntl
import os
import re
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TextIO

import psutil

from dist_qft.errors import DistQFTError, OutOfMemoryError, PeerLostError
from dist_qft.ranks.process import resident_peak

CRASH_FOLDER = "crash"

_PACKAGE = Path(__file__).parents[1]
_FATAL = re.compile(r"rank-\d+(-\d+)?\.fatal\.txt")


@contextlib.contextmanager
def crash_report(output_dir: Path, rank: int, world_size: int, doing: Callable[[], str]) -> Iterator[None]:
    """Context in which an unexpected error, a lost peer or a lack of memory is also written to a file, with stacks."""
    remove_empty_reports(output_dir / CRASH_FOLDER)
    with _fatal_signals(_report_path(output_dir, rank).with_suffix(".fatal.txt")):
        try:
            yield
        except Exception as error:
            if isinstance(error, PeerLostError | OutOfMemoryError) or not isinstance(error, DistQFTError):
                write_report(output_dir, error, rank, world_size, doing())
            raise


def last_collective(error: BaseException) -> str:
    """Name the call that failed in a collective, such as "all_reduce in FlatParameters.reduce (x.py:214)"."""
    called, ours = [], []
    for frame, line in traceback.walk_tb(_root(error).__traceback__):
        code, file = frame.f_code, Path(frame.f_code.co_filename)
        if file.name == "distributed_c10d.py":
            called = [code.co_name]
        elif _PACKAGE in file.parents:
            ours = [f"{code.co_qualname} ({file.name}:{line})"]
    return " in ".join([*called, *ours]) or "a collective"


def _root(error: BaseException) -> BaseException:
    return error.__cause__ if error.__cause__ is not None else error


@contextlib.contextmanager
def _fatal_signals(path: Path) -> Iterator[None]:
    """Stacks of all threads go to this file if the process dies of SIGSEGV and its like; no file is left otherwise."""
    if faulthandler.is_enabled():
        yield
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Another program that lives, such as a run that is being evaluated, keeps the usual name.
        file = _open_locked(path) or _open_locked(path.with_name(path.name.replace(".fatal", f"-{os.getpid()}.fatal")))
    except OSError:
        file = None
    if file is None:
        yield
        return
    faulthandler.enable(file)
    try:
        yield
    finally:
        faulthandler.disable()
        with contextlib.suppress(OSError):
            Path(file.name).unlink()
            path.parent.rmdir()  # unless there is a report in it
        file.close()


def remove_empty_reports(folder: Path) -> None:
    """Remove the empty files that killed ranks left. Those of living ranks are locked, and reports are not empty."""
    for path in folder.glob("rank-*.fatal.txt") if folder.is_dir() else ():
        with contextlib.suppress(OSError):
            if _FATAL.fullmatch(path.name) and path.is_file() and not path.is_symlink() and not path.stat().st_size:
                with open(path, "rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()


def _open_locked(path: Path) -> TextIO | None:
    """The file, emptied, and locked as long as it is open; None if another process has locked it."""
    file = open(path, "a")  # noqa: SIM115 - open as long as the process may die
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            raise BlockingIOError  # it was removed between the two lines above
    except (BlockingIOError, FileNotFoundError):
        file.close()
        return None
    except OSError:
        pass  # a file system without locks: nobody removes the file either
    file.truncate(0)
    return file


def write_report(output_dir: Path, error: Exception, rank: int, world_size: int, doing: str) -> None:
    """Write down an error and the stacks of all threads; silent if that fails, as the error itself matters more."""
    with contextlib.suppress(OSError):
        _write(_report_path(output_dir, rank), error, f"rank {rank} of {world_size}, at {doing}")


def _report_path(output_dir: Path, rank: int) -> Path:
    return output_dir / CRASH_FOLDER / f"rank-{rank}.txt"


def _write(path: Path, error: Exception, where: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    root = _root(error)
    because = "" if root is error else f"cause: {type(root).__name__}: {root}\n"
    used = psutil.Process().memory_info().rss / 2**20
    peak = resident_peak() / 2**20
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(
            f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {where}; process {os.getpid()} on {socket.gethostname()}\n"
            f"error: {type(error).__name__}: {error}\n{because}"
            f"last collective: {last_collective(error)}\n"
            f"memory: {used:.0f} MiB now, {peak:.0f} MiB at most\n\n"
        )
        file.writelines(_stack(root.__traceback__))
        file.write("\nall threads:\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)


def _stack(trace: TracebackType | None) -> list[str]:
    return ["stack of the error:\n", *traceback.format_tb(trace)]
