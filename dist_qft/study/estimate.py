"""The time that a study's remaining runs will take: from runs that are done, or from short trials on this machine.

A trial is the real run with a few steps: it loads the base, evaluates, trains, and merges if the study does. Its steps
are then multiplied. Runs of one method, format, size and length share a trial; nothing of it stays.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch

from dist_qft.config.load import change_config
from dist_qft.config.schema import RunConfig
from dist_qft.study.result_file import Result
from dist_qft.study.results import collect, distinct
from dist_qft.study.rows import Expansion
from dist_qft.study.run import run_apart, threads_of
from dist_qft.study.settings import Study
from dist_qft.study.study_run import StudyRun
from dist_qft.training.exact_share import run_length

TRIAL_STEPS = 5


@dataclass(frozen=True)
class Estimate:
    """Seconds of all runs one after another, the number of runs, and the basis of the figure in words."""

    seconds: float
    runs: int
    basis: str


def estimate(study: Study, expansion: Expansion, jobs: int) -> Estimate | None:
    """The time that is left, with `jobs` processes at once; None where no run could be tried.

    A search is counted with one value more than its first ones, since many widen once.
    """
    known: dict[str, list[float]] = {}
    left: dict[str, list[StudyRun]] = {}
    for outcome in distinct(collect(expansion.rows)):
        if outcome.finished:
            known.setdefault(_kind(outcome.row), []).append(outcome.finished.seconds)
        elif outcome.result is None:
            left.setdefault(_kind(outcome.row), []).append(outcome.row)
    for row in [*expansion.waiting, *_widened(study, expansion)]:
        left.setdefault(_kind(row), []).append(row)
    to_try = [rows[-1] for kind, rows in left.items() if kind not in known]
    tried = _trials(to_try, jobs)
    if any(seconds is None for seconds in tried):
        return None
    per_run = {kind: fmean(seconds) for kind, seconds in known.items()}
    per_run |= {_kind(row): seconds for row, seconds in zip(to_try, tried, strict=True) if seconds is not None}
    total = sum(per_run[kind] * len(rows) for kind, rows in left.items())
    runs = sum(map(len, left.values()))
    basis = [f"{sum(map(len, known.values()))} runs that are done"] if known else []
    basis += [f"{len(to_try)} trials of {TRIAL_STEPS} steps"] if to_try else []
    return Estimate(total, runs, " and ".join(basis) or "nothing is left")


def _kind(row: StudyRun) -> str:
    """Equal for runs that take equally long."""
    config = row.config
    train = config.train.model_dump(include={"max_steps", "num_train_epochs", "global_batch_size", "precision"})
    train["eval_steps"] = config.evaluation.eval_steps
    merge = row.merge.model_dump(exclude={"when"}) if row.merge else None
    length = config.data.max_length if config.data else 0
    model = config.model_dump(include={"model", "quantization"})
    searched = row.tries is not None  # on held-out data of its own
    return json.dumps([model, config.method.name, row.trainables, train, merge, length, searched], sort_keys=True)


def _widened(study: Study, expansion: Expansion) -> list[StudyRun]:
    """One further value for every search that has not ended."""
    tune = study.settings.tune
    if tune is None or not tune.widen:
        return []
    open_searches = {key for key, found in expansion.searches.items() if found.best is None}
    further = {}
    for row in expansion.rows:
        key = (row.label, row.variants[0])
        if row.tries is not None and key in open_searches:
            further[key, row.config.train.seed] = row
    return list(further.values())


def _trials(rows: Sequence[StudyRun], jobs: int) -> list[float | None]:
    """Seconds that each of these runs will take; None for one that cannot be tried."""
    if not rows:
        return []
    before = torch.get_num_threads()
    torch.set_num_threads(threads_of(jobs))
    try:
        with tempfile.TemporaryDirectory(prefix="dist-qft-trial-") as folder:
            short = [_shortened(row, Path(folder) / str(number)) for number, row in enumerate(rows)]
            results = run_apart(short)
    finally:
        torch.set_num_threads(before)
    return [None if found.exit_code else _in_full(row.config, found) for row, found in zip(rows, results, strict=True)]


def _in_full(config: RunConfig, trial: Result) -> float:
    """Seconds of a run by its trial, whose steps and evaluations it has more of."""
    costs = trial.costs
    steps, _ = run_length(config.train, round(costs["train_rows"]))
    # The bare base is evaluated once for many runs: a trial that did so is not typical.
    rest = trial.seconds - TRIAL_STEPS * costs.get("seconds_per_step", 0.0) - costs.get("base_evaluation_seconds", 0.0)
    more = _evaluations(config, steps) - _evaluations(config, TRIAL_STEPS)
    evaluations = more * costs.get("tuned_evaluation_seconds", 0.0)
    return max(rest, 0.0) + steps * costs.get("seconds_per_step", 0.0) + evaluations


def _evaluations(config: RunConfig, steps: int) -> int:
    """Evaluations on the way, before the last step."""
    every = config.evaluation.eval_steps
    return 0 if every is None else (steps - 1) // every


def _shortened(row: StudyRun, folder: Path) -> StudyRun:
    changes = {"output_dir": str(folder), "train.max_steps": TRIAL_STEPS, "train.warmup_steps": 0}
    return replace(row, config=change_config(row.config, changes), keep=())
