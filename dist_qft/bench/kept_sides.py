"""The sides that a long benchmark has measured, kept in a file until its report is written, to go on there later."""

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from dist_qft.bench.report import Side
from dist_qft.errors import SetupError


class KeptSides:
    """Sides by their names and settings, one JSON line each; with a line on standard error before each is measured.

    Args:
        path: of the file; None keeps nothing.
        count: sides that the benchmark has.
    """

    def __init__(self, path: Path | None, benchmark: str, count: int) -> None:
        self._path, self._benchmark, self._count = path, benchmark, count
        self._known = _read(path) if path is not None and path.is_file() else {}
        self._seconds: list[float] = []
        self._asked = 0

    def measure(self, name: str, settings: Mapping[str, Any], run: Callable[[], Side]) -> Side:
        """The side of this name and these settings as it was kept, or as `run` finds it now; a failed one is not kept.

        Raises:
            SetupError: the file cannot be written.
        """
        self._asked += 1
        key = json.dumps([self._benchmark, name, torch.__version__, dict(settings)], sort_keys=True)
        if key in self._known:
            self._say(f"{name}: measured before")
            return Side(name, self._known[key])
        mean = sum(self._seconds) / len(self._seconds) if self._seconds else None
        left = f", about {mean * (self._count - self._asked + 1) / 60:.0f} minutes left" if mean else ""
        self._say(f"{name}{left}")
        started = time.monotonic()
        side = run()
        self._seconds.append(time.monotonic() - started)
        if self._path is not None and side.error is None:
            try:
                with self._path.open("a", encoding="utf-8") as file:
                    line = json.dumps({"key": key, "metrics": dict(side.metrics)})
                    file.write(f"\n{line}\n")  # the line before may have been cut short
            except OSError as error:
                raise SetupError(f"--json: '{self._path}': cannot write: {error.strerror}") from error
        return side

    def _say(self, words: str) -> None:
        print(f"{self._benchmark}: {self._asked} of {self._count}: {words}", file=sys.stderr, flush=True)


def _read(path: Path) -> dict[str, dict[str, float]]:
    """The metrics of the sides by their keys. A line that was cut short counts as none."""
    known = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            known[entry["key"]] = entry["metrics"]
        except (ValueError, KeyError, TypeError):
            continue
    return known
