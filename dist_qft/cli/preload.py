"""Imports that the launcher makes before it forks its ranks, so that they need not."""

import importlib
from collections.abc import Sequence
from pathlib import Path

from dist_qft.cli.app import read_config
from dist_qft.errors import DistQFTError

# Verbs that several ranks may run (launch/common.sh has the same) -> the module with most of what a rank will import.
MODULES = {
    "train": "dist_qft.train",
    "eval": "dist_qft.evaluate",
    "generate": "dist_qft.generate",
    "chat": "dist_qft.chat",
    "merge": "dist_qft.merge.run",
    "lm-eval": "dist_qft.harness.command",
    "study": "dist_qft.study.run",
}


def preload(words: Sequence[str]) -> None:
    """Import what the command in `words` needs; nothing if it will be refused, which costs no import of torch then."""
    verb, *rest = words or [""]
    if verb not in MODULES or (verb == "train" and not _is_accepted(rest)):
        return
    importlib.import_module(MODULES[verb])


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
