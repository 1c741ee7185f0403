"""The files that the trackers' libraries write, read without those libraries (W&B: with its record type)."""

import json
import math
import sqlite3
import struct
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_qft.trackers.libraries import PROJECT


@dataclass
class Recorded:
    """The content of all runs that a tracker holds for one run of ours."""

    runs: set[str] = field(default_factory=set)
    figures: list[tuple[int, str, float]] = field(default_factory=list)
    texts: list[tuple[int, str, str]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)

    def by_tag(self, tag: str) -> list[tuple[int, float]]:
        return [(step, value) for step, name, value in self.figures if name == tag]


def read_trackio(folder: Path) -> Recorded:
    found = Recorded()
    with closing(sqlite3.connect(folder / f"trackio/{PROJECT}.db")) as store:
        for run, step, metrics in store.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id"):
            found.runs.add(run)
            for tag, value in json.loads(metrics).items():
                if isinstance(value, dict):
                    found.texts.append((step, tag, value["_value"]))
                else:
                    found.figures.append((step, tag, float(value)))
        for (config,) in store.execute("SELECT config FROM configs"):
            found.config = json.loads(config)
    return found


def read_mlflow(folder: Path) -> Recorded:
    found = Recorded()
    with closing(sqlite3.connect(folder / "mlflow.db")) as store:
        for run, tag, value, step, is_nan in store.execute("SELECT run_uuid, key, value, step, is_nan FROM metrics"):
            found.runs.add(run)
            found.figures.append((step, tag, math.nan if is_nan else value))
        found.config = dict(store.execute("SELECT key, value FROM params"))
    for path in sorted((folder / "mlflow").rglob("step-*.txt")):
        tag = path.relative_to(next(each for each in path.parents if each.name == "artifacts")).parent
        found.texts.append((int(path.name.split("-")[1]), str(tag), path.read_text()))
    return found


def read_wandb(folder: Path) -> Recorded:
    from wandb.proto import wandb_internal_pb2

    found = Recorded()
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in _wandb_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                found.runs.add(record.run.run_id)
                found.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif record.WhichOneof("record_type") == "history":
                row = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                step = row.pop("train/global_step")
                for tag, value in row.items():
                    if isinstance(value, str) and value != "NaN":
                        found.texts.append((step, tag, value))
                    elif not tag.startswith("_"):
                        found.figures.append((step, tag, float(value)))
    return found


def _wandb_records(content: bytes) -> Iterator[bytes]:
    """The records of W&B's file: LevelDB's log format, in blocks of 32 KiB, after 7 bytes of its own."""
    at, parts = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


READERS = {"wandb": read_wandb, "mlflow": read_mlflow, "trackio": read_trackio}
