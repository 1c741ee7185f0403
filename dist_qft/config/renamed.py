"""Keys that had another name in earlier versions. They are still read; a note names the present key."""

from typing import Any

from dist_qft.config.fault import KeyPath, dotted

# Old section and key -> the key's present name.
RENAMED: dict[tuple[str, str], str] = {("sharding", "reduction"): "gradient_sum"}


def current_path(path: KeyPath) -> KeyPath:
    """A key path with the present name of a key that was renamed."""
    section, key = (*path, "", "")[:2]
    new = RENAMED.get((str(section), str(key)))
    return path if new is None else (section, new, *path[2:])


def earlier_path(path: KeyPath) -> KeyPath:
    """The path that a file of an earlier version has for a key."""
    for (section, old), new in RENAMED.items():
        if path[:2] == (section, new):
            return (section, old, *path[2:])
    return path


def with_current_names(values: Any) -> Any:
    """The tree of a config with the present names. A key that stands there under both names is left, to be refused."""
    if not isinstance(values, dict):
        return values
    for (section, old), new in RENAMED.items():
        own = values.get(section)
        if isinstance(own, dict) and old in own and new not in own:
            values = {**values, section: {new if key == old else key: value for key, value in own.items()}}
    return values


def with_earlier_names(values: dict[str, Any]) -> dict[str, Any]:
    """The tree with the names that keys had first, for digests that a renaming must not change."""
    for (section, old), new in RENAMED.items():
        if new in values.get(section, {}):
            values = {**values, section: {old if key == new else key: value for key, value in values[section].items()}}
    return values


def renaming_notes(values: Any) -> list[str]:
    """A note for each key of the tree that has an earlier version's name."""
    return [
        f"{section}.{old}: now called {dotted((section, new))}"
        for (section, old), new in RENAMED.items()
        if isinstance(values, dict) and isinstance(values.get(section), dict) and old in values[section]
    ]
