"""The user's home folder, whose name is theirs and not for files that are passed on."""

import os
import re
from typing import Any


def without_home(value: Any) -> Any:
    """A copy of a JSON-like value in which `~` stands for the home folder wherever a path in its texts begins with it.

    Of folders that are everybody's (`/`, or no home at all) nothing changes.
    """
    home = os.path.expanduser("~").rstrip("/")
    return _shorten(value, re.compile(rf"(?<![\w./~-]){re.escape(home)}(?![\w.-])")) if home.startswith("/") else value


def _shorten(value: Any, home: re.Pattern[str]) -> Any:
    match value:
        case str():
            return home.sub("~", value)
        case dict():
            return {key: _shorten(each, home) for key, each in value.items()}
        case list() | tuple():
            return [_shorten(each, home) for each in value]
    return value
