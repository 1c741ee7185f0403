"""Paths below a folder that the user may not enter: there even a question for a file is refused."""

import os
from pathlib import Path

from dist_qft.errors import SetupError


def require_reachable(path: str | Path, key: str) -> None:
    """Prove that what is at `path`, and in it, can be asked for; it need not be there.

    Args:
        key: the setting that names it, for the message.

    Raises:
        SetupError: this user may not enter the folder itself or one above it.
    """
    try:
        os.stat(os.path.join(path, "."))
    except PermissionError:
        raise SetupError(f"{key}: got '{path}', must be in folders that this user may enter") from None
    except (OSError, ValueError):  # nothing there, a file, or no path at all: for others to say
        return
