"""Git LFS pointers: the few lines that stand in place of a large file in a clone made without Git LFS."""

from pathlib import Path

from dist_qft.errors import UserError

_BEGINS = b"version https://git-lfs"


def refuse_lfs_pointer(path: Path, key: str) -> None:
    """Raise UserError naming the config key if a file is such a pointer; a file that cannot be read is none."""
    try:
        with path.open("rb") as file:
            found = file.read(len(_BEGINS))
    except OSError:
        return
    if found == _BEGINS:
        raise UserError(f"{key}: {path} is a Git LFS pointer, must be the file; run `git lfs pull` there")
