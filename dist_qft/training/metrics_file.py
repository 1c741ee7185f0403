"""`metrics.jsonl`: the history of a run, one JSON object a line, each with the optimizer step it belongs to.

A checkpoint holds only the file's size and digest at its time, so saving costs the same at every step.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_qft.storage.atomic import json_text, publishing, write_text

METRICS_FILE = "metrics.jsonl"
_LOGGED = frozenset(("train/loss", "train/learning_rate", "train/grad_norm"))  # figures that every logged step has

_BLOCK = 1 << 20  # bytes read at a time; also, a line is looked for within so many bytes from the end


class MetricsFile:
    """The file, open for the records that follow those of `first_step`.

    Args:
        size: bytes that it had when step `first_step` was saved, 0 if unknown; records behind them are dropped, since
            the same steps are about to be reported again.
        digest: SHA-256 of those bytes, "" if unknown.

    Attributes:
        fault: a line for the user if the file is not the one of that step any more; else None.
    """

    def __init__(self, path: Path, first_step: int, size: int, digest: str = "") -> None:
        self.fault = _cut_back(path, first_step, size, digest)
        self._hash = _hash_of(path) if path.exists() else hashlib.sha256()
        self._file = open(path, "ab")  # noqa: SIM115 - open for the run

    def write(self, record: dict[str, Any]) -> None:
        """Append one record. Numbers that JSON lacks (NaN, infinities) become null."""
        line = json_text(record, indent=None).encode()
        self._file.write(line)
        self._file.flush()
        self._hash.update(line)

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    @property
    def digest(self) -> str:
        """SHA-256 of the file."""
        return self._hash.hexdigest()

    def sync(self) -> None:
        """Bring all records to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; a full disk has been reported by the write that met it."""
        with contextlib.suppress(OSError):
            self._file.close()


@dataclass(frozen=True)
class StepRecord:
    """The record of one logged step; `step` counts from 1, `tokens` are the targets that it trained on."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int = 0


def read_history(output_dir: Path) -> list[StepRecord]:
    """Every logged training step of a run, in order; empty without a metrics file. Damaged lines are left out."""
    found = [
        StepRecord(
            record["step"],
            record["train/loss"],
            record["train/learning_rate"],
            record["train/grad_norm"],
            record.get("train/target_tokens", 0),
        )
        for _, record in _records(output_dir / METRICS_FILE)
        if record.keys() >= _LOGGED
    ]
    # Numbers that JSON lacks are null.
    return [each for each in found if all(isinstance(value, float | int | None) for value in vars(each).values())]


def read_held_out(output_dir: Path) -> list[tuple[int, float]]:
    """Step and held-out loss of every evaluation of the tuned model, in order; empty without a metrics file.

    A step that was evaluated again, as the last one of a run that was stopped behind it, is there once.
    """
    found = (record for _, record in _records(output_dir / METRICS_FILE))
    losses = {record["step"]: record["eval/loss"] for record in found if isinstance(record.get("eval/loss"), float)}
    return list(losses.items())


def _records(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Every whole line of the file, if there is one, with its record; lines that a kill cut short are left out."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for line in file:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                record = json.loads(line)
                if line.endswith(b"\n") and isinstance(record["step"], int):
                    yield line, record


def _hash_of(path: Path, size: int | None = None) -> "hashlib._Hash":
    """The running SHA-256 of a file, or of its first `size` bytes."""
    found, left = hashlib.sha256(), path.stat().st_size if size is None else size
    with open(path, "rb") as file:
        while left and (block := file.read(min(left, _BLOCK))):
            found.update(block)
            left -= len(block)
    return found


def is_history_of(path: Path, size: int, digest: str) -> bool:
    """True if the file begins with the `size` bytes that have this SHA-256."""
    return path.is_file() and path.stat().st_size >= size and _hash_of(path, size).hexdigest() == digest


def _cut_back(path: Path, step: int, size: int, digest: str) -> str | None:
    """Drop the records of later steps and a line that a kill cut short; a fresh run (step 0) begins anew.

    Returns a line for the user if the records of the steps so far are not those that were saved.
    """
    if step == 0:
        write_text(path, "")
        return None
    if not path.exists():
        return f"warning: {path} is not there: the history of the first {step} steps is lost" if size else None
    if digest and is_history_of(path, size, digest):
        os.truncate(path, size)
        return None
    if not digest and _cut_at(path, step, size):
        return None
    with publishing(path, overwrite=True) as temporary, open(temporary, "wb") as kept:
        kept.writelines(line for line, record in _records(path) if record["step"] <= step)
    if not size:
        return None
    return f"warning: {path} was changed since step {step} was saved: the lines that can be read are kept"


def _cut_at(path: Path, step: int, size: int) -> bool:
    """Cut the file to `size` bytes if it was written up to there by step `step`; False if it was not."""
    if not 0 < size <= path.stat().st_size:
        return False
    with open(path, "rb") as file:
        file.seek(max(0, size - _BLOCK))
        end = file.read(size - file.tell())
    try:
        last = json.loads(end.splitlines()[-1])["step"]
    except (ValueError, KeyError, TypeError, IndexError):
        return False
    if not (end.endswith(b"\n") and isinstance(last, int) and last <= step):
        return False
    os.truncate(path, size)
    return True
