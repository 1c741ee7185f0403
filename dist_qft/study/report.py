"""A study's report: tables, figures and one page, from the runs that are done.

Nothing in it depends on when or in how many goes the runs were done, so the same results give the same files.
TensorBoard's hparams are written beside it; those carry the time, as all event files do.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from dist_qft.errors import SetupError, UserError
from dist_qft.storage.atomic import write_text
from dist_qft.study.figures import draw_all
from dist_qft.study.findings import Finding, find
from dist_qft.study.measurements import measure
from dist_qft.study.page import make_page
from dist_qft.study.results import Result, as_csv, as_json, collect
from dist_qft.study.rows import StudyRun
from dist_qft.study.settings import Study

REPORT_FOLDER = "report"
HPARAMS_FOLDER = "hparams"

_LOSS_UNITS = {
    "causal-lm": "nats per token",
    "classification": "nats per text",
    "regression": "squared error per text",
}


def write_report(study: Study, rows: Sequence[StudyRun]) -> str:
    """Write the report of all runs that are done, and return a line that says where.

    Raises:
        UserError: no run with the study's metric is done, or no reference.
    """
    metric = study.settings.metric
    outcomes = collect(rows)
    done = [(outcome.row, outcome.finished) for outcome in outcomes if outcome.finished]
    subjects = measure(outcomes, metric)
    if not subjects:
        known = sorted({name for _, result in done for name in result.tuned})
        what = f"none of the {len(done)} runs that are done is a reference with the held-out figure '{metric}'"
        raise UserError(f"{study.output_dir}: nothing to report: {what}; measured: {', '.join(known) or 'nothing'}")
    unit = _LOSS_UNITS[study.base.task.name] if metric == "loss" else ""
    findings = find(subjects, unit or f"of {metric}")
    pictures = list(draw_all(subjects, metric, unit))
    folder = study.output_dir / REPORT_FOLDER
    write_text(folder / "results.csv", as_csv(outcomes))
    write_text(folder / "results.json", as_json(outcomes))
    write_text(folder / "findings.json", json.dumps([_finding(finding) for finding in findings], indent=1) + "\n")
    for picture in pictures:
        for ending in ("png", "svg"):
            _write_bytes(folder / "figures" / f"{picture.name}.{ending}", getattr(picture, ending))
    write_text(folder / "report.html", make_page(study, outcomes, subjects, findings, pictures))
    _write_hparams(study.output_dir / HPARAMS_FOLDER, done, metric)
    return f"report of {len(done)} of {len(rows)} runs: {folder / 'report.html'}"


def _finding(finding: Finding) -> dict[str, object]:
    estimate = finding.estimate
    interval = [estimate.low, estimate.high] if len(estimate.per_seed) > 1 else None
    numbers = {"mean": estimate.mean, "interval_95": interval, "per_seed": list(estimate.per_seed)}
    return {"verdict": finding.verdict, "sentence": finding.sentence, **asdict(finding), "estimate": numbers}


def _write_bytes(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise SetupError(f"{path}: cannot write: {error.strerror}") from error


def _write_hparams(folder: Path, done: Sequence[tuple[StudyRun, Result]], metric: str) -> None:
    """One set of settings and results for each run, as TensorBoard's hparams tab reads them."""
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    for row, result in done:
        settings = {
            **row.subject,
            "variant": " = ".join(map(str, row.variants)),
            "seed": row.config.train.seed,
            "method": row.config.method.name,
            "learning_rate": row.config.train.learning_rate,
            "trainables": row.trainables,
            **{f"kept/{group}": share for group, share in row.kept.items()},
        }
        results = {"result/last_training_loss": result.history[-1]}
        if metric in result.tuned:
            results[f"result/held_out_{metric}"] = result.tuned[metric]
        with SummaryWriter(str(folder / row.name)) as writer:
            writer.add_hparams(settings, results, run_name=".")
