"""The record of a run for the report: one small JSON file in its folder, written when it has ended, well or not."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dist_qft.errors import CorruptFileError
from dist_qft.storage.atomic import write_text
from dist_qft.training.metrics_file import read_held_out, read_history
from dist_qft.tuned_model.held_out import HeldOut, RowScore

if TYPE_CHECKING:
    from dist_qft.study.study_run import StudyRun
    from dist_qft.training.training_run import TrainingRun

RESULT_FILE = "result.json"
ROWS_FILE = "rows.json"  # the score of every held-out row, from which the report resamples


@dataclass(frozen=True)
class Result:
    """The end of a run, and its figures.

    Attributes:
        base, tuned: figure -> value on held-out data, before and after training; "loss" is in nats per target, and
            "merged_loss" that of the merged file; "task/..." and "merged_task/..." are of lm-evaluation-harness.
        eval_tokens: targets of the held-out data.
        history: training loss of every step that was logged (`train.logging_steps`).
        held_out: [step, held-out loss] of every evaluation of the tuned model (`evaluation.eval_steps`).
        seconds: of the run here, with the loading of its base if it loaded one.
        train_tokens: targets that all steps trained on, from those of the steps that were logged.
        costs: name -> value, such as "seconds_per_step", "base_evaluation_seconds", "weight_bytes".
    """

    name: str
    exit_code: int = 0
    error: str | None = None
    trainables: int = 0
    base: dict[str, float] = field(default_factory=dict)
    tuned: dict[str, float] = field(default_factory=dict)
    eval_tokens: int = 0
    history: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    train_tokens: int = 0
    costs: dict[str, float] = field(default_factory=dict)

    @classmethod
    def failed(cls, row: "StudyRun", exit_code: int, error: str) -> "Result":
        """The record of a run that would fail again."""
        return cls(row.name, exit_code, error)

    @classmethod
    def of_run(
        cls, row: "StudyRun", run: "TrainingRun", seconds: float, further: dict[str, float], costs: dict[str, float]
    ) -> "Result":
        """The record of a run that came to its end; `further` figures are those of its merged file and of tasks."""
        history = read_history(row.folder)
        logged = sum(record.tokens for record in history)
        return cls(
            row.name,
            trainables=run.flat.count,
            base=_figures(run.evaluations.base),
            tuned=_figures(run.evaluations.tuned) | further,
            eval_tokens=run.evaluations.tuned.tokens if run.evaluations.tuned else 0,
            history=[record.loss for record in history],
            held_out=read_held_out(row.folder),
            seconds=round(seconds, 3),
            train_tokens=round(logged / max(len(history), 1) * run.state.step),
            costs=costs,
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


def result_version(folder: Path) -> tuple[int, int] | None:
    """A mark of the result in a run's folder that another one does not have; None if there is none."""
    try:
        found = (folder / RESULT_FILE).stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def write_result(folder: Path, result: Result) -> None:
    """Put the result in place, whole or not at all."""
    write_text(folder / RESULT_FILE, json.dumps(asdict(result), indent=1) + "\n")


def write_rows(folder: Path, scores: Mapping[str, Mapping[int, RowScore]]) -> None:
    """Write the score of every held-out row: "tuned" for the live model, "merged" for the merged file."""
    lines = {
        which: [[row, s.loss, s.targets, s.predicted, s.label] for row, s in rows.items()]
        for which, rows in scores.items()
    }
    write_text(folder / ROWS_FILE, json.dumps(lines) + "\n")


def read_rows(folder: Path, which: str) -> dict[int, RowScore]:
    """The scores of a run's held-out rows; empty if there are none.

    Raises:
        CorruptFileError: the file is not one of ours.
    """
    path = folder / ROWS_FILE
    try:
        return {row: RowScore(*score) for row, *score in json.loads(path.read_bytes()).get(which, [])}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError) as error:
        raise CorruptFileError(f"{path}: not the rows of a study's run: {error}") from None
