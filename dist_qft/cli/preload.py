"""Imports that the launcher makes before it forks its ranks, so that they need not."""

import importlib
from collections.abc import Sequence
from pathlib import Path

from dist_qft.cli.app import read_config
from dist_qft.errors import DistQFTError

# Verb -> the module with most of what a rank will import.
_MODULES = {
    "train": "dist_qft.train",
    "eval": "dist_qft.evaluate",
    "generate": "dist_qft.generate",
    "merge": "dist_qft.merge.run",
    "study": "dist_qft.study.run",
}


def preload(words: Sequence[str]) -> None:
    """Import what the command in `words` needs; nothing if it will be refused, which costs no import of torch then."""
    verb, *rest = words or [""]
    if verb not in _MODULES or (verb == "train" and not _is_accepted(rest)):
        return
    importlib.import_module(_MODULES[verb])


def _is_accepted(words: list[str]) -> bool:
    """True if the config of `train` and its overrides are in order. The ranks say what is wrong with others."""
    if "--resume" in words:
        at = words.index("--resume")
        words = words[:at] + words[at + 2 :]
    try:
        read_config(Path(words[0] if words else ""), words[1:])
    except DistQFTError:
        return False
    return True
