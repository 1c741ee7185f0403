"""The record of a run for the report: one small JSON file in its folder, written when it has ended, well or not."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_qft.errors import CorruptFileError
from dist_qft.storage.atomic import write_text
from dist_qft.study.groups import THIRDS, TYPES
from dist_qft.study.rows import StudyRun
from dist_qft.training.metrics_file import read_history
from dist_qft.tuned_model.held_out import HeldOut

if TYPE_CHECKING:
    from dist_qft.training.training_run import TrainingRun

RESULT_FILE = "result.json"


@dataclass(frozen=True)
class Result:
    """The end of a run, and its figures.

    Attributes:
        base, tuned: figure -> value on held-out data, before and after training; "loss" is in nats per target.
        eval_tokens: targets of the held-out data.
        history: training loss of every step that was logged (`train.logging_steps`).
        seconds: of the run here, with the loading of its base if it loaded one.
    """

    name: str
    exit_code: int = 0
    error: str | None = None
    trainables: int = 0
    base: dict[str, float] = field(default_factory=dict)
    tuned: dict[str, float] = field(default_factory=dict)
    eval_tokens: int = 0
    history: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @classmethod
    def failed(cls, row: StudyRun, exit_code: int, error: str) -> "Result":
        """The record of a run that would fail again."""
        return cls(row.name, exit_code, error)

    @classmethod
    def of_run(cls, row: StudyRun, run: "TrainingRun", seconds: float) -> "Result":
        """The record of a run that came to its end."""
        return cls(
            row.name,
            trainables=run.flat.count,
            base=_figures(run.evaluations.base),
            tuned=_figures(run.evaluations.tuned),
            eval_tokens=run.evaluations.tuned.tokens if run.evaluations.tuned else 0,
            history=[record.loss for record in read_history(row.folder)],
            seconds=round(seconds, 3),
        )


def _figures(held_out: HeldOut | None) -> dict[str, float]:
    return {} if held_out is None else {"loss": held_out.loss, **held_out.metrics}


def read_result(folder: Path) -> Result | None:
    """The result in a run's folder; None if the run has not ended.

    Raises:
        CorruptFileError: the file is not one of ours.
    """
    path = folder / RESULT_FILE
    try:
        return Result(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise CorruptFileError(f"{path}: not a result of a study's run: {error}") from None


def write_result(folder: Path, result: Result) -> None:
    """Put the result in place, whole or not at all."""
    write_text(folder / RESULT_FILE, json.dumps(asdict(result), indent=1) + "\n")


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
    def status(self) -> str:
        if self.result is None:
            return "not run"
        return "done" if self.done else f"failed ({self.result.exit_code})"


def collect(rows: Sequence[StudyRun]) -> list[Outcome]:
    """Every run with its result, in the study's order."""
    return [Outcome(row, read_result(row.folder)) for row in rows]


def as_json(outcomes: Sequence[Outcome]) -> str:
    """All runs, one entry (and line) each, with their training losses. Times are left out: they are the machine's."""
    entries = [
        {
            "run": outcome.row.name,
            "status": outcome.status,
            "subject": outcome.row.subject,
            "variants": [{"preset": v.preset, "group": v.group, "value": v.value} for v in outcome.row.variants],
            "seed": outcome.row.config.train.seed,
            "method": outcome.row.config.method.model_dump(exclude_none=True),
            "trainables": outcome.row.trainables,
            "kept": outcome.row.kept,
            "error": outcome.result.error if outcome.result else None,
            "base": outcome.result.base if outcome.result else {},
            "tuned": outcome.result.tuned if outcome.result else {},
            "eval_tokens": outcome.result.eval_tokens if outcome.result else 0,
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
        ["run", "status", *axes, "preset", "group", "value", "seed", "trainables"]
        + [f"kept_{name}" for name in groups]
        + [f"{which}_{name}" for name in figures for which in ("base", "tuned")]
        + ["last_training_loss"]
    )
    for outcome in outcomes:
        row, result = outcome.row, outcome.finished
        measured: list[Any] = [""] * (2 * len(figures) + 1)
        if result:
            measured = [f"{getattr(result, which)[name]:.6f}" for name in figures for which in ("base", "tuned")]
            measured.append(f"{result.history[-1]:.6f}")
        kept = [f"{row.kept[name]:.6f}" if name in row.kept else "" for name in groups]
        for variant in row.variants:
            about = [variant.preset, variant.group, variant.value, row.config.train.seed, row.trainables]
            writer.writerow([row.name, outcome.status, *row.subject.values(), *about, *kept, *measured])
    return text.getvalue()
