"""Paths in a config: `~` and `$VAR` stand for the home folder and environment variables, as in a shell."""

import errno
import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

_LARGEST_FILE = 16 << 20
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


def expanded(path: str) -> str:
    """A path without `~`, `~user`, `$VAR` and `${VAR}`; those that stand for nothing are left, to be refused."""
    return os.path.expanduser(os.path.expandvars(path))


ExpandedPath = Annotated[str, Field(min_length=1), AfterValidator(expanded)]


def read_bounded(path: str | Path) -> bytes:
    """The content of a file of settings. OSError if it cannot be read or goes on and on, as a device may."""
    with open(path, "rb") as file:
        content = file.read(_LARGEST_FILE + 1)
    if len(content) > _LARGEST_FILE:
        raise OSError(errno.EFBIG, f"more than {_LARGEST_FILE >> 20} MiB, which no file of settings has")
    return content


def unexpanded(path: str) -> str | None:
    """The reason why something in a path could not be expanded; None if everything was."""
    if (found := _VARIABLE.search(path)) is not None:
        return f"the environment variable {found[1] or found[2]} is not set"
    return f"there is no user {path.partition('/')[0][1:]!r}" if path.startswith("~") else None
