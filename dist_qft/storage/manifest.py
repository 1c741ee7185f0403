"""Folders that prove they are whole: a manifest of the size and SHA-256 of every file.

A folder is written under a temporary name, read back, synced and renamed (`atomic`), so that a kill or a full disk at
any moment leaves either nothing of it or all of it. The content of the files is not known here.
"""

import hashlib
import os
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError

from dist_qft.errors import CorruptFileError, SetupError
from dist_qft.storage.atomic import publishing

MANIFEST = "manifest.json"


class _Entry(BaseModel):
    size: int
    sha256: str


class _Manifest(BaseModel):
    version: Literal[1] = 1
    files: dict[str, _Entry]

    def to_bytes(self) -> bytes:
        return self.model_dump_json(indent=1).encode() + b"\n"


def publish_folder(final: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Write named files and their manifest as the folder `final`, which must not exist yet.

    `files` may be a generator: each file is written before the next is asked for, so only one is in memory.

    Raises:
        SetupError: no space or no permission, or the folder has appeared meanwhile; nothing is left behind.
        CorruptFileError: the files read back differently from the written bytes.
    """
    with publishing(final, overwrite=False) as temporary:
        temporary.mkdir()
        manifest = _Manifest(files={name: _write(temporary, name, data) for name, data in files})
        _write(temporary, MANIFEST, manifest.to_bytes())
        if fault := fault_in(temporary, manifest.files):
            raise CorruptFileError(f"{final}: read back differently from what was written: {fault}")


def fault_in(folder: Path, names: Collection[str]) -> str | None:
    """The fault of a folder that must have exactly these files, with the file; None if all are as its manifest says."""
    try:
        raw = (folder / MANIFEST).read_bytes()
        manifest = _Manifest.model_validate_json(raw)
    except OSError as error:
        return f"{MANIFEST}: {error.strerror}"
    except ValidationError:
        return f"{MANIFEST}: not a manifest of this version"
    # Sizes and digests are checked against the files, the rest of the manifest against the only form it can have.
    if raw != manifest.to_bytes():
        return f"{MANIFEST}: altered since it was written"
    if wrong := set(manifest.files) ^ set(names):
        name = min(wrong)
        return f"{MANIFEST}: {'does not list' if name in names else 'lists'} {name!r}"
    faults = (_fault_in_file(folder / name, manifest.files[name]) for name in names)
    return next((fault for fault in faults if fault), None)


def _fault_in_file(path: Path, expected: _Entry) -> str | None:
    try:
        if not path.is_file():
            return f"{path.name}: no such file"
        if (size := path.stat().st_size) != expected.size:
            return f"{path.name}: {size} bytes, the manifest says {expected.size}"
        found = sha256_of(path)
    except OSError as error:
        return f"{path.name}: {error.strerror}"
    if found != expected.sha256:
        return f"{path.name}: SHA-256 {found}, the manifest says {expected.sha256}"
    return None


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(folder: Path, name: str, data: bytes) -> _Entry:
    try:
        with open(folder / name, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        free = shutil.disk_usage(folder).free
        raise SetupError(
            f"{folder.parent}: cannot write {name}, {len(data)} bytes, with {free} bytes free: {error.strerror}"
        ) from error
    return _Entry(size=len(data), sha256=hashlib.sha256(data).hexdigest())
