"""A YAML file that knows the line of each key. YAML is read as version 1.2: `1e-4` is a number, `on` a string."""

from functools import cached_property
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode
from ruamel.yaml.reader import ReaderError

from dist_qft.config.fault import KeyPath
from dist_qft.config.paths import read_bounded
from dist_qft.errors import UserError


class Document:
    """A YAML file: its values and, on demand, the line where a key stands."""

    def __init__(self, path: str | Path, text: str, values: dict[str, Any]) -> None:
        self.path = path
        self.values = values
        self._text = text

    @classmethod
    def read(cls, path: str | Path) -> "Document":
        try:
            text = read_bounded(path).decode("utf-8-sig")
        except OSError as error:
            raise UserError(f"{path}: cannot read the config: {error.strerror}") from None
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            raise UserError(f"{path}:{line}: not UTF-8 text") from None
        try:
            values = make_yaml().load(text)
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            raise UserError(f"{path}:{mark.line + 1}: not valid YAML: {error.problem}") from None
        except ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            raise UserError(f"{path}:{line}: not valid YAML: {error.reason}") from None
        except (YAMLError, ValueError) as error:
            raise UserError(f"{path}: not valid YAML: {error}") from None
        except RecursionError:
            raise UserError(f"{path}: not valid YAML: nested too deeply") from None
        if not isinstance(values, dict):
            kind = "is empty" if values is None else f"is a {type(values).__name__}"
            raise UserError(f"{path}: {kind}, must be a mapping of settings such as 'output_dir: runs/first'")
        return cls(path, text, values)

    @cached_property
    def _root(self) -> Node:
        return make_yaml().compose(self._text)

    def line(self, path: KeyPath) -> int | None:
        """1-based line of the key or list entry at `path`; None if it is not in the file."""
        node, line = self._root, None
        for part in path:
            found = _entry(node, part)
            if found is None:
                return None
            node, line = found
        return line


def _entry(node: Node, part: str | int) -> tuple[Node, int] | None:
    """A child node, and the line of its key (in a mapping) or of itself (in a list)."""
    if isinstance(node, MappingNode):
        for key, value in node.value:
            if key.value == str(part):
                return value, key.start_mark.line + 1
    if isinstance(node, SequenceNode) and isinstance(part, int) and part < len(node.value):
        return node.value[part], node.value[part].start_mark.line + 1
    return None


def make_yaml() -> YAML:
    """ruamel's safe loader and dumper."""
    # `pure`: the C parser of older ruamel releases reads YAML 1.1, where 1e-4 is a string.
    return YAML(typ="safe", pure=True)
