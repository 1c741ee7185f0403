"""A study's report: tables, figures and one page, from the runs that are done.

Nothing in it depends on when or in how many goes the runs were done, so the same results give the same files.
TensorBoard's hparams are written beside it; those carry the time, as all event files do.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

import matplotlib

from dist_qft.errors import SetupError, UserError
from dist_qft.storage.atomic import write_text
from dist_qft.study.arm_figures import arms_figure, tuning_figure
from dist_qft.study.contrasts import Compared, compare, unanswered
from dist_qft.study.figures import STYLE, Picture, draw_all
from dist_qft.study.findings import Finding, find
from dist_qft.study.measurements import Subject, measure
from dist_qft.study.page import make_page
from dist_qft.study.result_file import Result
from dist_qft.study.results import Outcome, as_csv, as_json, collect, distinct
from dist_qft.study.rows import Expansion, expand_all
from dist_qft.study.settings import Study
from dist_qft.study.soundness import warnings_of
from dist_qft.study.study_run import StudyRun

REPORT_FOLDER = "report"
HPARAMS_FOLDER = "hparams"
COSTS_FILE = "costs.json"  # beside the report, which says nothing of the machine


def write_report(study: Study) -> str:
    """Write the report of all runs that are done, and return a line that says where.

    Raises:
        UserError: no run with the study's metric is done, or no reference.
    """
    metric, expansion = study.settings.metric, expand_all(study)
    outcomes = collect(expansion.rows)
    runs = distinct(outcomes)
    done = [(outcome.row, outcome.finished) for outcome in runs if outcome.finished]
    subjects = measure(outcomes, metric)
    if not subjects:
        known = sorted({name for _, result in done for name in result.tuned})
        what = f"none of the {len(done)} runs that are done is a reference with the held-out figure '{metric}'"
        raise UserError(f"{study.output_dir}: nothing to report: {what}; measured: {', '.join(known) or 'nothing'}")
    unit = study.base.task.loss_unit if metric == "loss" else ""
    findings = find(subjects, unit or f"of {metric}")
    pictures = list(_pictures(study, expansion, subjects, unit))
    compared = compare(study, outcomes)
    warnings = [*warnings_of(study, outcomes, expansion.searches), *unanswered(study, compared)]
    folder = study.output_dir / REPORT_FOLDER
    write_text(folder / "results.csv", as_csv(outcomes))
    write_text(folder / "results.json", as_json(outcomes))
    write_text(folder / "findings.json", json.dumps([_finding(finding) for finding in findings], indent=1) + "\n")
    write_text(folder / "contrasts.json", json.dumps([_contrast(each) for each in compared], indent=1) + "\n")
    write_text(folder / "tuning.json", json.dumps(_searches(expansion), indent=1) + "\n")
    write_text(folder / "warnings.json", json.dumps(warnings, indent=1) + "\n")
    for picture in pictures:
        for ending in ("png", "svg"):
            _write_bytes(folder / "figures" / f"{picture.name}.{ending}", getattr(picture, ending))
    page = make_page(study, expansion, outcomes, subjects, findings, compared, warnings, pictures)
    write_text(folder / "report.html", page)
    _write_hparams(study.output_dir / HPARAMS_FOLDER, done, metric)
    write_text(study.output_dir / COSTS_FILE, json.dumps(times_of(outcomes), indent=1) + "\n")
    told = [f"report of {len(done)} of {len(runs)} runs: {folder / 'report.html'}"]
    return "\n".join([*told, *(f"warning: {each}" for each in warnings), *(each.sentence for each in compared)])


def _pictures(study: Study, expansion: Expansion, subjects: Sequence[Subject], unit: str) -> Iterator[Picture]:
    """Every figure that there are runs for."""
    metric, tune = study.settings.metric, study.settings.tune
    with matplotlib.rc_context(STYLE):
        if tune is not None and (picture := tuning_figure(expansion.searches, tune.axis)):
            yield picture
        label = f"held-out {metric}{f' ({unit})' if unit else ''}"
        if study.settings.contrasts and (picture := arms_figure(subjects, label)):
            yield picture
    yield from draw_all(subjects, metric, unit, study.base.task.loss_unit)


def _contrast(compared: Compared) -> dict[str, object]:
    effect = compared.effect
    interval = [effect.low, effect.high] if len(effect.per_seed) > 1 else None
    return {
        "verdict": compared.verdict,
        "sentence": compared.sentence,
        "contrast": compared.contrast.model_dump(),
        "figures": list(compared.figures),
        "means": list(compared.means),
        "effect": {"mean": effect.mean, "interval_95_seeds": interval, "per_seed": list(effect.per_seed)},
        "interval_95_rows": None if compared.rows is None else list(compared.rows),
        "share": compared.share,
        "p": compared.p,
        "adjusted_p": compared.adjusted,
    }


def _searches(expansion: Expansion) -> list[dict[str, object]]:
    return [
        {
            "subject": label,
            "variant": str(variant),
            "metric": search.metric,
            "best": search.best,
            "on_edge": search.on_edge,
            "curve": [list(point) for point in search.curve()],
            "failed": sorted(v for v, f in search.figures.items() if f is not None and abs(f) == float("inf")),
        }
        for (label, variant), search in expansion.searches.items()
    ]


def times_of(outcomes: Sequence[Outcome]) -> dict[str, dict[str, float]]:
    """Mean seconds of each combination's runs that are compared: of a step, of the whole."""
    found: dict[str, dict[str, float]] = {}
    for label in dict.fromkeys(outcome.row.label for outcome in outcomes):
        known = [o.finished for o in outcomes if o.row.label == label and o.row.tries is None and o.finished]
        steps = [result.costs["seconds_per_step"] for result in known if "seconds_per_step" in result.costs]
        if steps:
            found[label] = {"seconds_per_step": fmean(steps), "seconds": fmean(result.seconds for result in known)}
    return found


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
        if row.tries is not None:
            continue
        results = {"result/last_training_loss": result.history[-1]} if result.history else {}
        if metric in result.tuned:
            results[f"result/held_out_{metric}"] = result.tuned[metric]
        with SummaryWriter(str(folder / row.name)) as writer:
            writer.add_hparams(settings, results, run_name=".")
