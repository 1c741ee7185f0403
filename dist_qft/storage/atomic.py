"""Put a file or folder in place complete, or not at all: the one way in which anything of ours is written.

It is written under a temporary name beside its place, synced to the disk and renamed. The temporary name tells which
process writes (`owner`), so that the leftovers of a killed process can be removed without touching files that a living
one is writing. Files that are not ours are never removed.
"""

import ctypes
import json
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dist_qft.errors import SetupError
from dist_qft.storage.owner import Owner

# .tmp-<name>-<owner>-<random>; the old content of a replaced folder has "-replaced" behind it for a moment.
_TEMPORARY = re.compile(r"\.tmp-(?P<name>.+)-(?P<owner>[0-9a-f]{16}-\d+-\d+)-[0-9a-f]{8}(?P<replaced>-replaced)?")
# Earlier versions did not write the owner.
_WITHOUT_OWNER = re.compile(r"\.tmp-(?P<name>.+)-[0-9a-f]{8}(?P<replaced>-replaced)?")
_NAME_BYTES = 120  # of the final name in a temporary one: file systems allow 255 for all of it
_ABANDONED_SECONDS = 24 * 3600  # unchanged for so long, a temporary of another machine counts as left behind


@contextmanager
def publishing(final: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a name beside `final` to write a file or folder to; on success it is synced and gets the final name.

    On any failure the temporary is removed. A killed process leaves it behind; the next attempt removes it.

    Raises:
        SetupError: no space, no permission, or without `overwrite` something has appeared under the final name.
    """
    temporary = temporary_name(final)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(final.parent, final.name)
        yield temporary
        _sync(temporary)
        try:
            _rename(temporary, final, overwrite)
        except FileExistsError:
            raise SetupError(f"{final}: it has appeared meanwhile; nothing was replaced") from None
    except OSError as error:
        raise refused_write(final, error) from error
    finally:
        _remove(temporary)


def write_text(path: Path, text: str) -> None:
    """Replace a text file (UTF-8) in one step: readers find the old text or the new one, never a part.

    Raises:
        SetupError: the system refuses the write.
    """
    with publishing(path, overwrite=True) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step; see `json_text` and `write_text`."""
    write_text(path, json_text(value))


def json_text(value: Any, indent: int | None = 1) -> str:
    """`value` as valid JSON and a newline. JSON has no NaN and no infinities: they become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _finite(each) for key, each in value.items()}
        case list() | tuple():
            return [_finite(each) for each in value]
    return value


def refused_write(final: Path, error: OSError) -> SetupError:
    """The error for a write that the system refused: place, reason, free space."""
    free = shutil.disk_usage(nearest_existing(final.absolute().parent)).free
    return SetupError(f"{final}: cannot write: {error.strerror or error} ({free} bytes are free)")


def nearest_existing(path: Path) -> Path:
    """The path itself if it is there, else the nearest folder above it that this user can see."""
    # os.path's: Path's own raises below a folder that the user may not enter.
    return next(folder for folder in [path, *path.absolute().parents] if os.path.exists(folder))


def temporary_name(final: Path) -> Path:
    """A new name beside `final` that tells who writes there and that no reader takes for a finished result."""
    return final.parent / f".tmp-{_shortened(final.name)}-{Owner.current()}-{uuid.uuid4().hex[:8]}"


def lock_path(final: Path) -> Path:
    """The lock file beside `final` of those who would write it at the same time."""
    return final.parent / f".{_shortened(final.name)}.lock"


def _shortened(name: str) -> str:
    return name.encode()[:_NAME_BYTES].decode(errors="ignore")


def remove_folder(folder: Path) -> None:
    """Remove a published folder. It is renamed first, so that no reader finds only some of its files.

    Raises:
        SetupError: the system refuses to rename it.
    """
    doomed = temporary_name(folder)
    try:
        os.rename(folder, doomed)
    except OSError as error:
        raise SetupError(f"{folder}: cannot remove the folder: {error.strerror}") from error
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(parent: Path, name: str | None = None) -> None:
    """Remove half-written files of dead processes in `parent`; with `name` only those that would have become `name`.

    Temporaries of living processes stay. Those of other machines, where nobody can look, go after a day without change.
    """
    for path in parent.iterdir():
        match = _TEMPORARY.fullmatch(path.name)
        # Without an owner in its name, a file is recognized as ours only by a final name of ours.
        match = match or (_WITHOUT_OWNER.fullmatch(path.name) if name is not None else None)
        wanted = match is not None and (name is None or match["name"] == _shortened(name))
        if match and wanted and _is_abandoned(path, match):
            _give_up(path, match)


def remove_unfinished(parent: Path, names: re.Pattern[str]) -> None:
    """Remove every temporary that would have become one of `names`; only for the one process that may write those."""
    for path in parent.iterdir():
        match = _TEMPORARY.fullmatch(path.name) or _WITHOUT_OWNER.fullmatch(path.name)
        if match and names.fullmatch(match["name"]):
            _give_up(path, match)


def _is_abandoned(path: Path, match: re.Match[str]) -> bool:
    owner = Owner.parse(match.groupdict().get("owner") or "")
    alive = owner.is_alive() if owner else None
    if alive is not None:
        return not alive
    try:
        return time.time() - path.lstat().st_mtime > _ABANDONED_SECONDS
    except OSError:
        return False


def _give_up(path: Path, match: re.Match[str]) -> None:
    """Remove a leftover; but give an old result, whose replacement died before its last rename, its name back."""
    final = path.with_name(match["name"])
    if match["replaced"] and not final.exists():
        if len(match["name"].encode()) < _NAME_BYTES - 3:  # or the name may be cut
            with suppress(OSError):
                os.rename(path, final)
        return
    _remove(path)


def _rename(temporary: Path, final: Path, overwrite: bool) -> None:
    """Give `temporary` its final name; FileExistsError if something has that name and must not be replaced."""
    replaced = None
    if not overwrite:
        _rename_to_new(temporary, final)
    else:
        if final.is_dir() and temporary.is_dir():
            if _exchange(temporary, final):  # what has the temporary name now is the old folder
                sync_entry(final.parent)
                return
            # A folder cannot be renamed onto another: without an exchange the old one steps aside first.
            replaced = temporary.with_name(f"{temporary.name}-replaced")
            os.rename(final, replaced)
        os.replace(temporary, final)
    sync_entry(final.parent)
    if replaced is not None:
        _remove(replaced)  # of a link the name alone


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step (Linux, renameat2). False where the system or the file system cannot."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    at_working_folder, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return call(at_working_folder, os.fsencode(first), at_working_folder, os.fsencode(second), exchange) == 0


def _rename_to_new(temporary: Path, final: Path) -> None:
    if temporary.is_dir():
        if final.exists():
            raise FileExistsError(final)
        os.rename(temporary, final)  # fails on a folder that has appeared since, unless it is empty
        return
    try:
        os.link(temporary, final)  # fails if the name is taken, however lately
        temporary.unlink()
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if final.exists():
            raise FileExistsError(final) from None
        os.rename(temporary, final)


def _sync(path: Path) -> None:
    mode = 0o666 & ~_umask()
    for entry in [*path.rglob("*"), path] if path.is_dir() else [path]:
        if entry.is_file():
            # Some writers (safetensors) make private files, which a cache or result for several users must not be.
            entry.chmod(mode)
        sync_entry(entry)


def _umask() -> int:
    """The process's umask, read without the usual set-and-restore, which other threads would notice."""
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("Umask:")), 8)
    return 0o022


def _remove(path: Path) -> None:
    """Remove as far as the system allows; the error that led here is the one worth reporting."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def sync_entry(path: Path) -> None:
    """Have the system write a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
