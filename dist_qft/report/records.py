"""The records in a run's folder: settings, figures per step, answers, checkpoints, merged results.

Every file may be missing: a run that was stopped has no summary, and still a page.
"""

import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dist_qft.config.load import CONFIG_FILE, load_config
from dist_qft.config.schema import RunConfig
from dist_qft.errors import DistQFTError, UserError
from dist_qft.merge.certificate import IN_FOLDER, Certificate
from dist_qft.merge.certificate_file import read_certificate
from dist_qft.storage.checkpoint import list_checkpoints
from dist_qft.storage.run_folder import SUMMARY_FILE, read_json_object
from dist_qft.training.metrics_file import METRICS_FILE


@dataclass(frozen=True)
class Answer:
    """A prompt, and the answers of the base and of the tuned model; None where there is none."""

    prompt: str
    base: str | None
    tuned: str | None


@dataclass(frozen=True)
class RunRecords:
    """The files of one run, read.

    Attributes:
        metrics: the lines of `metrics.jsonl`, each with the optimizer step (counted from 1) that it belongs to.
        summary: `summary.json`; empty before the run has come to its end.
        certificates: of the merged results in the folder, and the files they were read from.
    """

    folder: Path
    config: RunConfig
    metrics: tuple[Mapping[str, Any], ...]
    summary: Mapping[str, Any]
    checkpoints: tuple[Path, ...]
    certificates: tuple[tuple[Path, Certificate], ...] = field(default=())

    @classmethod
    def read(cls, folder: Path) -> "RunRecords":
        """The records in `folder`. Raises UserError if it is not the folder of a run."""
        if not (folder / CONFIG_FILE).is_file():
            raise UserError(f"'{folder}' is not the folder of a run: it has no {CONFIG_FILE}")
        return cls(
            folder,
            load_config(folder / CONFIG_FILE, []),
            tuple(_lines(folder / METRICS_FILE)),
            read_json_object(folder / SUMMARY_FILE),
            tuple(list_checkpoints(folder)),
            tuple(_certificates(folder)),
        )

    def figure(self, name: str) -> float | None:
        """A finite number of the summary; None if it has none under this name. Anyone may have edited the file."""
        value = self.summary.get(name)
        return value if _is_number(value) else None

    @cached_property
    def steps(self) -> list[Mapping[str, Any]]:
        """The lines of optimizer steps, ascending."""
        return [line for line in self.metrics if "train/loss" in line]

    def curve(self, tag: str) -> list[tuple[float, float]]:
        """(step, value) of each line with a finite number under `tag`."""
        return [(line["step"], line[tag]) for line in self.metrics if _is_number(line.get(tag))]

    def mean(self, tag: str) -> float | None:
        """The mean over the logged steps; None if the tag was not logged."""
        values = [value for _, value in self.curve(tag)]
        return math.fsum(values) / len(values) if values else None

    def answers(self) -> list[Answer]:
        """The last answers to each of the run's prompts."""
        base, tuned = self._answers("base"), self._answers("tuned")
        return [Answer(prompt, base.get(prompt), tuned.get(prompt)) for prompt in dict.fromkeys([*base, *tuned])]

    def _answers(self, which: str) -> dict[str, str]:
        """The last answer to each prompt. A record holds the prompt, an empty line and the answer."""
        texts = [line[f"answer/{which}"] for line in self.metrics if isinstance(line.get(f"answer/{which}"), str)]
        found = {}
        for text in texts:
            for prompt in self.config.evaluation.prompts:
                if text.startswith(f"{prompt}\n\n"):
                    found[prompt] = text.removeprefix(f"{prompt}\n\n")
        return found


def _is_number(value: object) -> bool:
    """True for a number that is finite as a float: JSON has NaN, Infinity and integers of any size, too."""
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def _lines(path: Path) -> Iterator[Mapping[str, Any]]:
    """The records of a JSON Lines file; a line that cannot be read, such as a last one half written, is left out."""
    if not path.is_file():
        return
    for line in path.read_bytes().split(b"\n"):
        text = line.decode(errors="replace")  # a damaged disk may write anything; the figures around it count
        try:
            record = json.loads(text)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int) and _is_number(record["step"]):
            yield record


def _certificates(folder: Path) -> Iterator[tuple[Path, Certificate]]:
    for place in sorted([*folder.glob(f"*.{IN_FOLDER}"), *folder.glob(f"*/{IN_FOLDER}")]):
        try:
            yield place, read_certificate(place)[1]
        except DistQFTError:  # what is not readable is no result; `dist-qft verify` says why
            continue
