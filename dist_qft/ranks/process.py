"""The start, peak and end of every process of ours: it ends with its launcher, outlives its terminal, exits at once.

Imports nothing heavy: it runs before the imports that take seconds.
"""

import contextlib
import ctypes
import errno
import gc
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from threading import Thread
from typing import Any, NoReturn, TextIO, cast

import psutil

from dist_qft.errors import SetupError
from dist_qft.ranks.launchers import LAUNCHER, MPI_LAUNCHERS, local_rank_text
from dist_qft.ranks.preemption import SAVE_SECONDS, leave_on_stop_signals

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_POLL_SECONDS = 1.0
_GONE = (errno.EPIPE, errno.EIO, errno.EBADF)
# Modules stay: looking for garbage among them as often as usual would take a tenth of the time of importing them.
_USUAL_THRESHOLDS, _IMPORTING_THRESHOLDS = gc.get_threshold(), (50_000, 20, 20)


def begin(*, stops_early: bool) -> None:
    """Prepare this process.

    Args:
        stops_early: see `leave_on_stop_signals`.
    """
    if stops_early:
        leave_on_stop_signals()
    gc.set_threshold(*_IMPORTING_THRESHOLDS)
    sys.stdout, sys.stderr = cast(TextIO, LastingStream(sys.stdout)), cast(TextIO, LastingStream(sys.stderr))
    end_with_launcher()


def imported() -> None:
    """Collect garbage as usual from now on, but never again look at what there is already. Once after `begin`."""
    if gc.get_threshold() == _IMPORTING_THRESHOLDS:
        gc.freeze()
        gc.set_threshold(*_USUAL_THRESHOLDS)


def resident_peak() -> int:
    """Largest resident size of this process so far, in bytes."""
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def leave(code: int) -> NoReturn:
    """Exit at once. Python's own shutdown takes long enough for the peers to fail first and hide this rank's code."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class LastingStream:
    """A standard stream that goes silent when nobody reads it any more (`| head`, a closed terminal), without an error.

    A run of hours must not end because of its messages.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream or _nowhere()  # None: it was closed from the start

    def write(self, text: str) -> int:
        with self._lasting():
            try:
                self._stream.write(text)
            except UnicodeEncodeError:  # a locale without these characters: escapes say more than nothing
                encoding = self._stream.encoding or "ascii"
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with self._lasting():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _lasting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # a full disk behind a redirection may get free again
            if error.errno in _GONE:
                self._stream = _nowhere()
        except ValueError:  # closed by this process
            self._stream = _nowhere()


def _nowhere() -> TextIO:
    return open(os.devnull, "w")


# --- the launcher ----------------------------------------------------------------------------------------------------


def launcher_mark() -> str:
    """The value of `LAUNCHER` that makes this process the launcher of those it starts."""
    return f"{socket.gethostname()}:{os.getpid()}"


def end_with_launcher(env: Mapping[str, str] = os.environ) -> None:
    """End this process when its launcher ends, for whatever reason: by SIGTERM, and after an hour at once.

    The launcher is the process that `LAUNCHER` names (all between it and this process count, too), and the parent of a
    rank that torchrun or MPI started. Exits with SetupError's code if the launcher has ended already.
    """
    parents = [process.pid for process in psutil.Process().parents()]
    launcher = _launcher_on_this_host(env)
    watched: list[int] = []
    if launcher is not None:
        if not psutil.pid_exists(launcher):
            sys.stderr.write(f"error: the launcher of this process (process {launcher}) has ended\n")
            leave(SetupError.exit_code)
        # Something between may have left the family, as an ssh to this same host does.
        watched = parents[: parents.index(launcher) + 1] if launcher in parents else [launcher]
        if launcher == parents[0] and sys.platform == "linux":
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    elif parents and ("TORCHELASTIC_RUN_ID" in env or any(names.rank in env for names in MPI_LAUNCHERS)):
        watched = parents[:1]
    if watched:
        Thread(target=_end_after, args=(watched,), name="launcher watch", daemon=True).start()


def _launcher_on_this_host(env: Mapping[str, str]) -> int | None:
    host, _, pid = env.get(LAUNCHER, "").rpartition(":")
    # A launcher that became this process by exec, as for --dry-run, is not another one.
    other = host == socket.gethostname() and pid.isdecimal() and int(pid) != os.getpid()
    return int(pid) if other else None


def _end_after(processes: Sequence[int]) -> None:
    """Wait until one of these processes has ended; then have this one save, and end it if it does not."""
    try:
        poll = select.poll()
        for pid in processes:
            poll.register(os.pidfd_open(pid), select.POLLIN)
        poll.poll()
    except ProcessLookupError:
        pass
    except (AttributeError, OSError):  # not Linux, or an old kernel
        while all(psutil.pid_exists(pid) for pid in processes):
            time.sleep(_POLL_SECONDS)
    if local_rank_text() == "0":
        sys.stderr.write("the launcher has ended: stopping\n")
        sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SAVE_SECONDS)
    os._exit(128 + signal.SIGTERM)
