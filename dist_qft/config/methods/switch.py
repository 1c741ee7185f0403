"""Another method on the command line than in the file: the keys of the file's `method` section that still apply."""

from typing import Any

from dist_qft.config.methods.door import DEFAULT, METHODS
from dist_qft.config.methods.tile_method import TileMethod

_SELECTION = {"layers", "depth"}


def keys_for(section: dict[str, Any], name: str) -> tuple[dict[str, Any], str | None]:
    """A file's `method` section for the method `name`, and a note on the keys that were dropped.

    Only keys that other methods have are dropped, so a misspelt one is still refused. A rule of the schedule that sets
    nothing afterwards goes, too.
    """
    before, kind = section.get("name", DEFAULT), METHODS[name]
    others = {key for other in METHODS.values() for key in other.model_fields} - set(kind.model_fields)
    kept = {key: value for key, value in section.items() if key not in others}
    dropped = [key for key in section if key not in kept]
    if issubclass(kind, TileMethod) and isinstance(kept.get("schedule"), list):
        knobs = {key for other in METHODS.values() if issubclass(other, TileMethod) for key in other.knobs()}
        foreign = knobs - set(kind.knobs())
        kept["schedule"], keys = _rules_without(foreign, kept["schedule"])
        dropped += [f"{key} in schedule" for key in keys]
    note = f"method.name: {name} on the command line, {before} in the file; dropped from the file: {', '.join(dropped)}"
    return kept, note if dropped else None


def _rules_without(foreign: set[str], rules: list[Any]) -> tuple[list[Any], list[str]]:
    """The rules without these keys, and the keys that were there."""
    kept, found = [], {}
    for rule in rules:
        own = {key: value for key, value in rule.items() if key not in foreign} if isinstance(rule, dict) else rule
        if own != rule:
            found.update(dict.fromkeys(key for key in rule if key in foreign))
            if own.keys() <= _SELECTION:
                continue
        kept.append(own)
    return kept, list(found)
