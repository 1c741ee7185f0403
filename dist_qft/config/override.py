"""One `key.sub=value` from the command line, and how it is put into a tree of values."""

from copy import copy
from dataclasses import dataclass
from typing import Any

from ruamel.yaml.error import YAMLError

from dist_qft.config.document import make_yaml
from dist_qft.config.fault import KeyPath, dotted
from dist_qft.config.renamed import current_path


class OverrideError(Exception):
    """The reason why one override cannot be applied."""


@dataclass(frozen=True)
class Override:
    """One override.

    Attributes:
        text: as it was given.
        path: the key, by its present name.
    """

    text: str
    path: KeyPath
    value: Any

    @classmethod
    def parse(cls, text: str) -> "Override":
        """Parse `key.sub=value`; raises OverrideError unless it has that form, with a value in YAML."""
        key, equals, value = text.partition("=")
        if not equals or not all(key.split(".")):
            raise OverrideError("must be key.sub=value")
        try:
            return cls(text, current_path(key_path(key)), make_yaml().load(value))
        except (YAMLError, ValueError, RecursionError):
            raise OverrideError("the value is not valid YAML; put it in quotes") from None

    def notes(self) -> list[str]:
        """A note if the key was given by its earlier name."""
        given = key_path(self.text.partition("=")[0])
        return [f"{dotted(given)}: now called {dotted(self.path)}"] if given != self.path else []

    def apply(self, values: dict[str, Any]) -> dict[str, Any]:
        """The tree with this override; the given one stays as it is."""
        return _replaced(values, self.path, 0, self.value)


def key_path(key: str) -> KeyPath:
    """The parts of a dotted key; dashes count as underscores."""
    return tuple(int(part) if part.isdecimal() else part for part in key.replace("-", "_").split("."))


# Words that stand for a whole section with its defaults.
_WORDS: tuple[tuple[KeyPath, Any], ...] = ((("quantization",), "auto"),)


def _replaced(container: Any, path: KeyPath, depth: int, value: Any) -> Any:
    """`container`, which stands at `path[:depth]`, with the entry at `path` set to `value`.

    Containers on the way are copied, not written to: a YAML alias may share them with another key.
    """
    if depth == len(path):
        return value
    part = path[depth]
    container = {} if container is None or (path[:depth], container) in _WORDS else copy(container)
    child: Any
    if isinstance(container, list):
        if not (isinstance(part, int) and part < len(container)):
            raise OverrideError(f"'{dotted(path[:depth])}' is a list of {len(container)}, positions count from 0")
        child = container[part]
    elif isinstance(container, dict):
        child = container.get(part)
    else:
        raise OverrideError(f"'{dotted(path[:depth])}' is not a section")
    container[part] = _replaced(child, path, depth + 1, value)
    return container
