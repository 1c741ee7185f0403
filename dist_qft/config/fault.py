"""A fault of a config: the key it is about, and the message to the user."""

from dataclasses import dataclass

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Fault:
    """One fault. `message` starts with the key; files and lines are put in front by `dist_qft.config.load`."""

    path: KeyPath
    message: str


def dotted(path: KeyPath) -> str:
    """The key as it is written on the command line, list positions included: `method.schedule.0.rank`."""
    return ".".join(map(str, path))


def value_fault(path: KeyPath, message: str) -> Fault:
    """A fault in the value of a key; `message` names the given value and the values that it must have."""
    return Fault(path, f"{dotted(path)}: {message}")
