"""`metrics.jsonl`: the history of a run, one JSON object a line, each with the optimizer step it belongs to.

A checkpoint holds only the file's size at its time and a digest of the losses, so saving costs the same at every step.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_qft.storage.atomic import json_text, publishing, write_text

METRICS_FILE = "metrics.jsonl"

_LAST_LINE_BYTES = 1 << 20  # a line is looked for within so many bytes from the end


class MetricsFile:
    """The file, open for the records that follow those of `first_step`.

    Args:
        size: bytes that it had when step `first_step` was saved, 0 if unknown; records behind them are dropped, since
            the same steps are about to be reported again.
    """

    def __init__(self, path: Path, first_step: int, size: int) -> None:
        _cut_back(path, first_step, size)
        self._file = open(path, "ab")  # noqa: SIM115 - open for the run

    def write(self, record: dict[str, Any]) -> None:
        """Append one record. Numbers that JSON lacks (NaN, infinities) become null."""
        self._file.write(json_text(record, indent=None).encode())
        self._file.flush()

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

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
    """Every logged training step of a run, in order; empty without a metrics file."""
    path = output_dir / METRICS_FILE
    if not path.exists():
        return []
    return [
        StepRecord(
            record["step"],
            record["train/loss"],
            record["train/learning_rate"],
            record["train/grad_norm"],
            record.get("train/target_tokens", 0),
        )
        for _, record in _records(path)
        if "train/loss" in record
    ]


def _records(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Every whole line of the file with its record; lines that a kill cut short are left out."""
    with open(path, "rb") as file:
        for line in file:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                record = json.loads(line)
                if line.endswith(b"\n") and isinstance(record["step"], int):
                    yield line, record


def _cut_back(path: Path, step: int, size: int) -> None:
    """Drop the records of later steps and a line that a kill cut short; a fresh run (step 0) begins anew."""
    if step == 0:
        write_text(path, "")
    elif path.exists() and not _cut_at(path, step, size):
        with publishing(path, overwrite=True) as temporary, open(temporary, "wb") as kept:
            kept.writelines(line for line, record in _records(path) if record["step"] <= step)


def _cut_at(path: Path, step: int, size: int) -> bool:
    """Cut the file to `size` bytes if it was written up to there by step `step`; False if it was not."""
    if not 0 < size <= path.stat().st_size:
        return False
    with open(path, "rb") as file:
        file.seek(max(0, size - _LAST_LINE_BYTES))
        end = file.read(size - file.tell())
    try:
        last = json.loads(end.splitlines()[-1])["step"]
    except (ValueError, KeyError, TypeError, IndexError):
        return False
    if not (end.endswith(b"\n") and isinstance(last, int) and last <= step):
        return False
    os.truncate(path, size)
    return True
