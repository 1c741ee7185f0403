"""Git LFS pointers: the few lines that stand in place of a large file in a clone made without Git LFS."""

from pathlib import Path

_BEGINS = b"version https://git-lfs"


def is_lfs_pointer(path: Path) -> bool:
    """True if a file is such a pointer; false if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(_BEGINS)) == _BEGINS
    except OSError:
        return False


def lfs_fault(path: Path) -> str:
    """One line on a pointer where the file itself is needed."""
    return f"{path} is a Git LFS pointer, must be the file; run `git lfs pull` there"
