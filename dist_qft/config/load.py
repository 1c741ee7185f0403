"""Read a YAML file and `key.sub=value` overrides into a checked `RunConfig`, or into one message with every fault.

The meaning of the settings is elsewhere: types and ranges in `schema`, rules between settings in `check`, the
wording of faults in `validation`.
`save_config` is the way back, for the copy that a run keeps in its folder.
"""

import itertools
import shutil
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from operator import itemgetter
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dist_qft.config.check import cross_field_faults
from dist_qft.config.document import Document, make_yaml
from dist_qft.config.fault import Fault, KeyPath, dotted, value_fault
from dist_qft.config.methods.door import DEFAULT, METHODS
from dist_qft.config.methods.switch import keys_for
from dist_qft.config.override import Override, OverrideError, key_path
from dist_qft.config.renamed import current_path, earlier_path, renaming_notes, with_current_names
from dist_qft.config.schema import RunConfig
from dist_qft.config.validation import validation_faults
from dist_qft.errors import UserError
from dist_qft.storage.atomic import publishing

_MOST_LINES, _LONGEST_LINE = 100, 1000
_MOST_LOCATED = 200  # finding the line of a fault takes time
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
    applied: list[Override] = []
    lines: list[str] = []
    for text in overrides:
        try:
            applied.append(Override.parse(text))
        except OverrideError as error:
            lines.append(f"command line: {text}: {error}")
    values, notes = _for_the_method_of(applied, with_current_names(document.values))
    notes += renaming_notes(document.values)
    for override in list(applied):
        try:
            values = override.apply(values)
            notes += override.notes()
        except OverrideError as error:
            lines.append(f"command line: {override.text}: {error}")
            applied.remove(override)
    values = with_current_names(values)
    config, faults = _checked(values)
    located = [_located(fault, document, applied) for fault in faults[:_MOST_LOCATED]]
    lines += [text for _, text in sorted(located, key=itemgetter(0))]
    if config is None or lines:
        raise UserError(_readable(lines, len(lines) + len(faults) - len(located)))
    return config.with_notes(dict.fromkeys(notes)) if notes else config


def _checked(values: dict[str, Any]) -> tuple[RunConfig | None, list[Fault]]:
    """The config of a tree, if it has the schema's types, and the tree's faults."""
    if faults := list(_texts_beyond_unicode(values)):
        return None, faults
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        return None, validation_faults(error, values)
    return config, cross_field_faults(config)


def _texts_beyond_unicode(value: Any, path: KeyPath = ()) -> Iterator[Fault]:
    """Texts that no file can hold: with half of a surrogate pair (an escape in YAML) or bytes of a command line."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            yield value_fault(path, f"got {value[error.start : error.end]!a} in the text, must be Unicode characters")
    elif isinstance(value, dict | list):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts_beyond_unicode(entry, (*path, key))


def _readable(lines: Sequence[str], total: int) -> str:
    """As many of the lines as somebody reads, none longer than a screen, and the number of the others."""
    told = [line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]}..." for line in lines[:_MOST_LINES]]
    return "\n".join([*told, *([f"and {total - len(told)} more"] if total > len(told) else [])])


def _for_the_method_of(overrides: Sequence[Override], values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A file's values without keys that the method chosen by overrides does not use, and notes on those dropped."""
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
            values = Override(key, current_path(key_path(key)), value).apply(values)
        except OverrideError as error:
            raise UserError(f"{key}: {error}") from None
    changed, faults = _checked(values)
    if changed is None or faults:
        raise UserError("\n".join(fault.message for fault in faults))
    return changed.with_notes(config.notes)


def override_config(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """`config` with `key.sub=value` overrides, as `load_config` applies them to a file.

    Raises:
        UserError: an override cannot be applied; or, one line for each, the faults of the changed config.
    """
    if not overrides:
        return config
    changes = {}
    for text in overrides:
        try:
            changes[text.partition("=")[0]] = Override.parse(text).value
        except OverrideError as error:
            raise UserError(f"command line: {text}: {error}") from None
    # A config that was stored whole sets every key; those with their default value count as not set again.
    return change_config(RunConfig.model_validate(config.model_dump(exclude_defaults=True)), changes)


def save_config(config: RunConfig, path: str | Path) -> None:
    """Write the settings that file and overrides gave; `load_config` of that file returns an equal config."""
    Path(path).write_text(_saved_text(config), encoding="utf-8")


def keep_config(config: RunConfig, path: Path) -> Path | None:
    """Replace a run's copy of its config, complete or not at all.

    A text that somebody wrote by hand there, with comments or in another form, is copied first; returns that copy.

    Raises:
        SetupError: the system refuses the write.
    """
    aside = None
    with publishing(path, overwrite=True) as temporary:
        save_config(config, temporary)
        if path.is_file() and not _is_saved_text(path):
            names = (path.with_name(f"{path.name}.before{n or ''}") for n in itertools.count())
            aside = next(name for name in names if not name.exists())
            shutil.copyfile(path, aside)
    return aside


def _saved_text(config: RunConfig) -> str:
    yaml, text = make_yaml(), StringIO()
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # ruamel annotates it as None
    yaml.dump(config.model_dump(exclude_unset=True), text)
    return text.getvalue()


def _is_saved_text(path: Path) -> bool:
    """True for a file as `save_config` writes it."""
    try:
        return path.read_text(encoding="utf-8") == _saved_text(load_config(path))
    except (UserError, UnicodeDecodeError):
        return False


def _located(fault: Fault, document: Document, overrides: Sequence[Override]) -> tuple[int, str]:
    """Line number (0 on the command line) and text of a fault, which starts with its place.

    The place is the last override that set the key, else its line, else where the nearest section around it began.
    """
    for override in reversed(overrides):
        if override.path == fault.path[: len(override.path)]:
            # The override's own text names the key already.
            return 0, f"command line: {override.text}: {fault.message.removeprefix(f'{dotted(override.path)}: ')}"
    for length in range(len(fault.path), 0, -1):
        section = fault.path[:length]
        if line := document.line(section) or document.line(earlier_path(section)):
            return line, f"{document.path}:{line}: {fault.message}"
        for override in overrides:
            if override.path[:length] == section:
                return 0, f"command line: {override.text}: {fault.message}"
    return 0, f"{document.path}: {fault.message}"
