"""From a YAML file and `key.sub=value` overrides to a checked `RunConfig`, or to one message with every fault.

YAML is read as version 1.2 (so `1e-4` is a number and `on` is a string). What the settings mean is not known
here: types and ranges are in `schema`, rules between settings in `check`, the wording of faults in `validation`.
`save_config` is the way back, for the copy that a run keeps in its folder.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode
from ruamel.yaml.reader import ReaderError

from dist_qft.config.check import cross_field_faults
from dist_qft.config.fault import Fault, KeyPath, dotted
from dist_qft.config.methods.door import DEFAULT, METHODS
from dist_qft.config.methods.switch import keys_for
from dist_qft.config.schema import RunConfig
from dist_qft.config.validation import validation_faults
from dist_qft.errors import UserError

CONFIG_FILE = "config.yaml"  # what a run's folder calls the config it ran with


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config in the file `path` with `key.sub=value` overrides applied in order.

    An override's value is YAML; its key may name a section or, by position, an entry of a list
    (`method.schedule.0.rank=8`). Dashes in the key count as underscores.

    Raises:
        UserError: the file cannot be read or is not a YAML mapping; or, one line for each, every unknown key,
            wrong value, rule broken between settings, and override that cannot be applied.
    """
    document = Document.read(path)
    applied: list[_Override] = []
    lines: list[str] = []
    for text in overrides:
        try:
            applied.append(_Override.parse(text))
        except _OverrideError as error:
            lines.append(f"command line: {text}: {error}")
    values, notes = _for_the_method_of(applied, document.values)
    for override in list(applied):
        try:
            values = override.apply(values)
        except _OverrideError as error:
            lines.append(f"command line: {override.text}: {error}")
            applied.remove(override)
    try:
        config = RunConfig.model_validate(values)
        faults = cross_field_faults(config)
    except ValidationError as error:
        faults = validation_faults(error, values)
    located = [_located(fault, document, applied) for fault in faults]
    lines += [text for _, text in sorted(located, key=itemgetter(0))]
    if lines:
        raise UserError("\n".join(lines))
    return config.with_notes(notes) if notes else config


def _for_the_method_of(overrides: Sequence["_Override"], values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A file's values without what the method that overrides choose does not use, and notes on what was dropped."""
    name = next((override.value for override in reversed(overrides) if override.path == ("method", "name")), None)
    section = values.get("method")
    if not (isinstance(section, dict) and isinstance(name, str) and name in METHODS):
        return values, []
    if name == section.get("name", DEFAULT):
        return values, []
    kept, note = keys_for(section, name)
    return {**values, "method": kept}, [note] if note else []


def change_config(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """`config` with other values for some keys, each as `key.sub` (list positions count from 0), in their order.

    Raises:
        UserError: one line for every unknown key, wrong value and broken rule; each begins with the key.
    """
    values = config.model_dump(exclude_unset=True)
    for key, value in changes.items():
        try:
            values = _Override(key, _key_path(key), value).apply(values)
        except _OverrideError as error:
            raise UserError(f"{key}: {error}") from None
    try:
        changed = RunConfig.model_validate(values)
        faults = cross_field_faults(changed)
    except ValidationError as error:
        faults = validation_faults(error, values)
    if faults:
        raise UserError("\n".join(fault.message for fault in faults))
    return changed.with_notes(config.notes)


def override_config(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """`config` with `key.sub=value` overrides, as `load_config` applies them to a file.

    Raises:
        UserError: an override cannot be applied; or, one line for each, what is wrong with the changed config.
    """
    if not overrides:
        return config
    changes = {}
    for text in overrides:
        try:
            changes[text.partition("=")[0]] = _Override.parse(text).value
        except _OverrideError as error:
            raise UserError(f"command line: {text}: {error}") from None
    # A config that was stored whole sets every key; those with their default value count as not set again.
    return change_config(RunConfig.model_validate(config.model_dump(exclude_defaults=True)), changes)


def save_config(config: RunConfig, path: str | Path) -> None:
    """Write the settings that file and overrides gave; `load_config` of that file returns an equal config."""
    yaml = _yaml()
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # ruamel annotates it as None
    with open(path, "w", encoding="utf-8") as file:
        yaml.dump(config.model_dump(exclude_unset=True), file)


class _OverrideError(Exception):
    """Why one override cannot be applied."""


@dataclass(frozen=True)
class _Override:
    text: str
    path: KeyPath
    value: Any

    @classmethod
    def parse(cls, text: str) -> "_Override":
        key, equals, value = text.partition("=")
        if not equals or not all(key.split(".")):
            raise _OverrideError("need key.sub=value")
        try:
            return cls(text, _key_path(key), _yaml().load(value))
        except (YAMLError, ValueError, RecursionError):
            raise _OverrideError("the value is not valid YAML; put it in quotes") from None

    def apply(self, values: dict[str, Any]) -> dict[str, Any]:
        """The tree with this override; the given one stays as it is."""
        return _replaced(values, self.path, 0, self.value)


def _key_path(key: str) -> KeyPath:
    """The parts of a dotted key; dashes count as underscores."""
    return tuple(int(part) if part.isdecimal() else part for part in key.replace("-", "_").split("."))


def _replaced(container: Any, path: KeyPath, depth: int, value: Any) -> Any:
    """`container`, which stands at `path[:depth]`, with the entry at `path` set to `value`.

    Containers on the way are copied, not written to: a YAML alias may share them with another key.
    """
    if depth == len(path):
        return value
    part = path[depth]
    container = {} if container is None else copy(container)
    child: Any
    if isinstance(container, list):
        if not (isinstance(part, int) and part < len(container)):
            raise _OverrideError(f"'{dotted(path[:depth])}' is a list of {len(container)}, positions count from 0")
        child = container[part]
    elif isinstance(container, dict):
        child = container.get(part)
    else:
        raise _OverrideError(f"'{dotted(path[:depth])}' is not a section")
    container[part] = _replaced(child, path, depth + 1, value)
    return container


class Document:
    """A YAML file: its values and, on demand, the line where a key stands."""

    def __init__(self, path: str | Path, text: str, values: dict[str, Any]) -> None:
        self.path = path
        self.values = values
        self._text = text

    @classmethod
    def read(cls, path: str | Path) -> "Document":
        try:
            text = Path(path).read_bytes().decode("utf-8-sig")
        except OSError as error:
            raise UserError(f"{path}: cannot read the config: {error.strerror}") from None
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            raise UserError(f"{path}:{line}: not UTF-8 text") from None
        try:
            values = _yaml().load(text)
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
            raise UserError(f"{path}: {kind}, need a mapping of settings such as 'output_dir: runs/first'")
        return cls(path, text, values)

    @cached_property
    def _root(self) -> Node:
        return _yaml().compose(self._text)

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


def _located(fault: Fault, document: Document, overrides: Sequence[_Override]) -> tuple[int, str]:
    """Line number (0 on the command line) and text of a fault, which starts with its place.

    The place is the last override that set the key, else its line, else where the nearest section around it began.
    """
    for override in reversed(overrides):
        if override.path == fault.path[: len(override.path)]:
            # The override's own text names the key already.
            return 0, f"command line: {override.text}: {fault.message.removeprefix(f'{dotted(override.path)}: ')}"
    for length in range(len(fault.path), 0, -1):
        section = fault.path[:length]
        if line := document.line(section):
            return line, f"{document.path}:{line}: {fault.message}"
        for override in overrides:
            if override.path[:length] == section:
                return 0, f"command line: {override.text}: {fault.message}"
    return 0, f"{document.path}: {fault.message}"


def _yaml() -> YAML:
    # `pure`: the C parser of older ruamel releases reads YAML 1.1, where 1e-4 is a string.
    return YAML(typ="safe", pure=True)
