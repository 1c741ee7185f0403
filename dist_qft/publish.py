"""A file or folder appears under its name complete, or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dist_qft.errors import SetupError
from dist_qft.manifest import sync_entry, temporary_name, temporary_prefix


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
    if final.is_dir() and temporary.is_dir():
        # A folder cannot be renamed onto another: the old one steps aside first.
        replaced = temporary.with_name(f"{temporary.name}-replaced")
        os.rename(final, replaced)
    os.replace(temporary, final)
    sync_entry(final.parent)
    if replaced is not None:
        shutil.rmtree(replaced)


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
