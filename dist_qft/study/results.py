"""The runs of a study with their results, and the tables of both."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dist_qft.study.groups import THIRDS, TYPES
from dist_qft.study.result_file import Result, read_result
from dist_qft.study.study_run import StudyRun


@dataclass(frozen=True)
class Outcome:
    """A run and its result; None if it has not ended."""

    row: StudyRun
    result: Result | None

    @property
    def finished(self) -> Result | None:
        """The result of a run that ended well; None of any other."""
        return self.result if self.result is not None and self.result.exit_code == 0 else None

    @property
    def done(self) -> bool:
        return self.finished is not None

    @property
    def ended_search(self) -> bool:
        """True for a run of a search that has ended, well or not: a value that fails is one that is not chosen."""
        return self.row.tries is not None and self.result is not None

    @property
    def status(self) -> str:
        if self.result is None:
            return "not run"
        return "done" if self.done else f"failed ({self.result.exit_code})"


def collect(rows: Sequence[StudyRun]) -> list[Outcome]:
    """Every run with its result, in the study's order."""
    return [Outcome(row, read_result(row.folder)) for row in rows]


def distinct(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Each run once: one that several combinations chose is there for each of them."""
    return list({outcome.row.name: outcome for outcome in outcomes}.values())


def as_json(outcomes: Sequence[Outcome]) -> str:
    """All runs, one entry (and line) each, with their training losses. Times are left out: they are the machine's."""
    entries = [
        {
            "run": outcome.row.name,
            "status": outcome.status,
            "subject": outcome.row.subject,
            "variants": [{"preset": v.preset, "group": v.group, "value": v.value} for v in outcome.row.variants],
            "tries": outcome.row.tries,
            "learning_rate": outcome.row.config.train.learning_rate,
            "seed": outcome.row.config.train.seed,
            "method": outcome.row.config.method.model_dump(exclude_none=True),
            "trainables": outcome.row.trainables,
            "kept": outcome.row.kept,
            "error": outcome.result.error if outcome.result else None,
            "base": outcome.result.base if outcome.result else {},
            "tuned": outcome.result.tuned if outcome.result else {},
            "eval_tokens": outcome.result.eval_tokens if outcome.result else 0,
            "train_tokens": outcome.result.train_tokens if outcome.result else 0,
            "training_loss": [round(loss, 6) for loss in outcome.result.history] if outcome.result else [],
        }
        for outcome in outcomes
    ]
    return "[\n" + ",\n".join(map(json.dumps, entries)) + "\n]\n"


def as_csv(outcomes: Sequence[Outcome]) -> str:
    """One line for each run and each variant it stands for."""
    groups = ["total", *TYPES, *THIRDS]
    axes = list(outcomes[0].row.subject)
    figures = sorted({name for outcome in outcomes if outcome.finished for name in outcome.finished.tuned})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["run", "status", *axes, "preset", "group", "value", "tries", "seed", "trainables"]
        + [f"kept_{name}" for name in groups]
        + [f"{which}_{name}" for name in figures for which in ("base", "tuned")]
        + ["last_training_loss"]
    )
    for outcome in outcomes:
        row, result = outcome.row, outcome.finished
        measured: list[Any] = [""] * (2 * len(figures) + 1)
        if result:
            measured = [_digits(getattr(result, which).get(name)) for name in figures for which in ("base", "tuned")]
            measured.append(_digits(result.history[-1] if result.history else None))
        kept = [f"{row.kept[name]:.6f}" if name in row.kept else "" for name in groups]
        for variant in row.variants:
            about: list[Any] = [
                variant.preset,
                variant.group,
                variant.value,
                "" if row.tries is None else f"{row.tries:g}",
            ]
            about += [row.config.train.seed, row.trainables]
            writer.writerow([row.name, outcome.status, *row.subject.values(), *about, *kept, *measured])
    return text.getvalue()


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"
