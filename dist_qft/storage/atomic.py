"""A file or folder appears under its name complete, or not at all."""

import ctypes
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dist_qft.errors import SetupError

_REPLACED = "-replaced"
_TEMPORARY = ".tmp-"  # what a kill may leave behind begins with it


@contextmanager
def publishing(final: Path, overwrite: bool) -> Iterator[Path]:
    """Yields a name beside `final` to write a file or folder to; on success it is synced and gets the final name.

    On any failure what was written is removed; a killed process leaves it, and the next attempt removes it.

    Raises:
        SetupError: no space, no permission, or without `overwrite` something has appeared under the final name.
    """
    temporary, prefix = temporary_name(final), temporary_prefix(final)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _put_back(final)
        for entry in final.parent.iterdir():
            if entry.name.startswith(prefix):
                _remove(entry)
        yield temporary
        _sync(temporary)
        if final.exists() and not overwrite:
            raise SetupError(f"'{final}' has appeared meanwhile; nothing was replaced")
        _rename(temporary, final)
    except OSError as error:
        raise refused_write(final, error) from error
    finally:
        _remove(temporary)


def write_text(path: Path, text: str) -> None:
    """Write a text file as UTF-8, replacing what is there at once: whoever reads it finds the old text or the new."""
    with publishing(path, overwrite=True) as temporary:
        temporary.write_text(text, encoding="utf-8")


def refused_write(final: Path, error: OSError) -> SetupError:
    """The one line about a write that the system refused."""
    free = shutil.disk_usage(next(folder for folder in final.absolute().parents if folder.exists())).free
    return SetupError(f"{final}: cannot write: {error.strerror or error} ({free} bytes are free)")


def _rename(temporary: Path, final: Path) -> None:
    replaced = None
    if final.is_dir() and temporary.is_dir() and not _exchange(temporary, final):
        # A folder cannot be renamed onto another: without an exchange the old one steps aside first.
        replaced = temporary.with_name(f"{temporary.name}{_REPLACED}")
        os.rename(final, replaced)
    if temporary.is_dir() and final.is_dir():  # exchanged: what has the temporary name now is the old folder
        sync_entry(final.parent)
        return
    os.replace(temporary, final)
    sync_entry(final.parent)
    if replaced is not None:
        shutil.rmtree(replaced)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step (Linux, renameat2). False where the system or the file system cannot."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    at_working_folder, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return call(at_working_folder, os.fsencode(first), at_working_folder, os.fsencode(second), exchange) == 0


def _put_back(final: Path) -> None:
    """Give a folder its name again that stepped aside for a new one, if a kill came before that had the name."""
    aside = sorted(final.parent.glob(f"{glob.escape(temporary_prefix(final))}*{_REPLACED}"))
    if aside and not final.exists():
        os.rename(aside[0], final)


def _sync(path: Path) -> None:
    for entry in [*path.rglob("*"), path] if path.is_dir() else [path]:
        sync_entry(entry)


def _remove(path: Path) -> None:
    """As far as the system lets us: what went wrong before is what matters."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def temporary_name(final: Path) -> Path:
    """A name beside `final` that no reader takes for a finished one and that `remove_leftovers` knows."""
    return final.parent / f"{temporary_prefix(final)}{uuid.uuid4().hex[:8]}"


def temporary_prefix(final: Path) -> str:
    """What all temporary names of `final` begin with."""
    return f"{_TEMPORARY}{final.name}-"


def remove_folder(folder: Path) -> None:
    """Remove a published folder; renamed first, so that it is never seen with only some of its files."""
    doomed = temporary_name(folder)
    try:
        os.rename(folder, doomed)
    except OSError as error:
        raise SetupError(f"{folder}: cannot remove the folder: {error.strerror}") from error
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(parent: Path) -> None:
    """Remove what interrupted writes left behind; only while nobody writes."""
    for leftover in parent.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def sync_entry(path: Path) -> None:
    """Have the system write what it holds of a file, or of a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
