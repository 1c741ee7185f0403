"""One owner at a time for a folder or file on a disk that several processes, and several machines, may share.

A lock is a small JSON file that names its owner: process, host, time. It is made by linking, which is atomic on every
file system including NFS, and needs no lock daemon. A lock whose owner has ended is taken over:

* An owner on this machine is looked up among the processes: the lock of a killed process does not block the next start.
* An owner on another machine touches its lock every few seconds. If it has not done so for `STALE_SECONDS`, by the
  file server's own clock, it counts as ended. Should it wake up after that, `require_held` stops it before it writes.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_qft.errors import SetupError, UserError
from dist_qft.storage.atomic import refused_write, temporary_name
from dist_qft.storage.owner import Owner

RUN_LOCK = "run.lock"  # in a run's folder, while the run lasts

BEAT_SECONDS = 10.0
# NFS clients may see a file's time a minute late (acregmax).
STALE_SECONDS = 120.0

_POLL_SECONDS = 0.25
_RETURN_SECONDS = 2.0
_TELL_SECONDS = 5.0  # a wait that is over sooner is not worth a line
_TELL_AGAIN_SECONDS = 600.0  # of a wait that goes on


@dataclass(frozen=True)
class _Entry:
    """The content of a lock file."""

    owner: str
    pid: int
    host: str
    since: str
    job: str | None
    key: str  # tells apart two locks of one process

    @classmethod
    def new(cls) -> "_Entry":
        job = os.environ.get("SLURM_JOB_ID")
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(str(Owner.current()), os.getpid(), socket.gethostname(), now, job, uuid.uuid4().hex)

    @classmethod
    def read(cls, path: Path) -> "_Entry | None":
        """The entry in a lock file; None if there is no file or it is not ours."""
        try:
            values: dict[str, Any] = json.loads(path.read_bytes())
            return cls(**{name: values[name] for name in cls.__dataclass_fields__})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def __str__(self) -> str:
        job = f" (Slurm job {self.job})" if self.job else ""
        return f"process {self.pid} on {self.host}{job} since {self.since}"


class FolderLock:
    """A lock held by this process, from `acquire` until `release`."""

    def __init__(self, path: Path, entry: _Entry) -> None:
        self.path, self._entry = path, entry
        self._released = threading.Event()
        self._beat = threading.Thread(target=self._touch, name=f"lock {path.name}", daemon=True)
        self._beat.start()

    @classmethod
    def acquire(cls, path: Path, what: str, *, wait_seconds: float = 0.0, tell: bool = True) -> "FolderLock":
        """Take the lock file `path`.

        An owner on another machine that shows no sign of life is waited for until it counts as ended.

        Args:
            what: the thing that is locked, at the start of messages, such as "output_dir: 'runs/a'".
            wait_seconds: how long to wait for a living owner, counted from its last sign of life: a process that is
                stopped, or hangs, gives none.
            tell: say on standard error for whom it waits.

        Raises:
            UserError: a living process has it (`wait_seconds` 0).
            SetupError: it was not free in time, or the system refuses the file.
        """
        entry, started, tell_at, watch = _Entry.new(), time.monotonic(), _TELL_SECONDS, _Watch(path)
        while True:
            try:
                if _create(path, entry):
                    return cls(path, entry)
                alive = watch.holder_is_alive()
            except OSError as error:
                raise refused_write(path, error) from error
            waited = time.monotonic() - started
            if alive is False:
                continue
            if alive and time.monotonic() - watch.silent_since >= wait_seconds:
                raise _held(path, what, watch.holder, wait_seconds)
            if tell and waited > tell_at:
                holder = watch.holder or f"the owner of '{path}'"
                print(f"{what}: waiting for {holder}; if that is gone, remove '{path}'", file=sys.stderr, flush=True)
                tell_at = waited + _TELL_AGAIN_SECONDS
            time.sleep(_POLL_SECONDS)

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def require_held(self) -> None:
        """Make sure that nobody has taken the lock over; a lock file that somebody removed is made again.

        Raises:
            SetupError: another process has the lock, or the file is there and cannot be read or made.
        """
        deadline = time.monotonic() + _RETURN_SECONDS
        while (found := _Entry.read(self.path)) != self._entry:
            if found is not None:
                raise SetupError(f"{self.path}: {found} has taken the lock over; this process writes nothing more")
            # It may be away for a moment, while another start finds out that it is not the stale lock it took it for.
            if time.monotonic() > deadline:
                return self._make_again()
            time.sleep(_POLL_SECONDS)

    def _make_again(self) -> None:
        try:
            if _create(self.path, self._entry):
                return
        except OSError as error:
            raise refused_write(self.path, error) from error
        if (found := _Entry.read(self.path)) != self._entry:
            by = found or "something that cannot be read as a lock"
            raise SetupError(f"{self.path}: {by} has taken the lock over; this process writes nothing more")

    def release(self) -> None:
        """Give the lock up; a lock that somebody has taken over stays theirs."""
        self._released.set()
        self._beat.join()
        with contextlib.suppress(OSError):
            if _Entry.read(self.path) == self._entry:
                self.path.unlink()

    def _touch(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                if _Entry.read(self.path) == self._entry:
                    os.utime(self.path)


@contextmanager
def locked(path: Path, what: str, wait_seconds: float, *, tell: bool = True) -> Iterator[None]:
    """Context in which this process holds the lock file `path`; see `FolderLock.acquire`."""
    with FolderLock.acquire(path, what, wait_seconds=wait_seconds, tell=tell):
        yield


def _create(path: Path, entry: _Entry) -> bool:
    """Make the lock file with its content in one step; False if there is one."""
    draft = temporary_name(path)
    try:
        draft.write_text(json.dumps(asdict(entry)) + "\n")
        try:
            os.link(draft, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            try:
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                return False
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(json.dumps(asdict(entry)) + "\n")
        return True
    finally:
        draft.unlink(missing_ok=True)


class _Watch:
    """A watch over the lock of another process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.holder: _Entry | None = None
        self.silent_since = time.monotonic()  # the owner's last touch, or the beginning of the watch
        self._touched: float | None = None
        self._seen: float | None = None  # when it was touched while we watched, by our clock

    def holder_is_alive(self) -> bool | None:
        """True if the lock's owner runs; None as long as that is not known. A lock without an owner is removed."""
        holder = _Entry.read(self._path)
        if holder != self.holder:
            self.holder, self._touched, self._seen = holder, None, None
        if not self._look():
            return False
        owner = Owner.parse(holder.owner) if holder else None
        alive = owner.is_alive() if owner else None
        if alive is None:
            alive = self._shows_life()
        if alive is False:
            _take_away(self._path, holder)
        return alive

    def _look(self) -> bool:
        """Note whether the lock was touched; False if it is gone."""
        try:
            touched = self._path.stat().st_mtime
        except FileNotFoundError:
            return False
        if touched != self._touched:
            now = time.monotonic()
            if self._touched is not None:
                self._seen = self.silent_since = now
            self._touched = touched
        return True

    def _shows_life(self) -> bool | None:
        """True once an owner on another machine touches its lock while we watch, False once the lock is stale."""
        if self._seen is not None and time.monotonic() - self._seen < STALE_SECONDS:
            return True
        return False if _age(self._path) > STALE_SECONDS else None


def _age(path: Path) -> float:
    """Seconds since the lock was last touched, by the clock of the disk that it lies on."""
    probe = temporary_name(path)
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
    finally:
        probe.unlink(missing_ok=True)


def _take_away(path: Path, holder: _Entry | None) -> None:
    """Remove the lock of an owner that has ended; if somebody else has taken it over by now, leave it theirs."""
    away = temporary_name(path)
    try:
        os.rename(path, away)
    except FileNotFoundError:
        return
    if _Entry.read(away) != holder:
        with contextlib.suppress(OSError):
            os.link(away, path)
    away.unlink(missing_ok=True)


def _held(path: Path, what: str, holder: _Entry | None, wait_seconds: float) -> UserError | SetupError:
    by = f"it is in use by {holder}" if holder else f"it is locked by '{path}'"
    if wait_seconds:
        silent = f"still after {wait_seconds:g} s without a sign of life"
        return SetupError(f"{what}: {by}, {silent}; if that is gone, remove '{path}'")
    return UserError(f"{what}: {by}; stop that process or choose another folder, and if it is gone, remove '{path}'")
