"""The report as one HTML page that needs no other file: figures inside, findings in words, every variant in a table."""

import base64
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from dist_qft.pages import render
from dist_qft.storage.home import without_home
from dist_qft.study.contrasts import Compared
from dist_qft.study.figures import Picture
from dist_qft.study.findings import Finding, number
from dist_qft.study.measurements import Estimate, Subject
from dist_qft.study.presets import REFERENCE
from dist_qft.study.results import Outcome, distinct
from dist_qft.study.rows import Expansion
from dist_qft.study.settings import Study


def make_page(
    study: Study,
    expansion: Expansion,
    outcomes: Sequence[Outcome],
    subjects: Sequence[Subject],
    findings: Sequence[Finding],
    compared: Sequence[Compared],
    warnings: Sequence[str],
    pictures: Sequence[Picture],
) -> str:
    """The page's HTML."""
    config = study.base
    return render(
        __package__,
        "page.html.jinja",
        title=study.title,
        command=without_home(f"dist-qft study {study.document.path}"),
        base={
            "model": without_home(config.model.path),
            "linear layers": config.quantization.linear,
            "method": config.method.name,
            "steps": config.train.max_steps or f"{config.train.num_train_epochs:g} epochs",
            "samples per step": config.train.global_batch_size,
            "learning rate": f"{config.train.learning_rate:g}" if study.settings.tune is None else "tuned, see below",
            "held-out targets": _range(o.finished.eval_tokens for o in outcomes if o.finished and o.row.tries is None),
            "trained targets": _range(o.finished.train_tokens for o in outcomes if o.finished and o.row.tries is None),
            "seeds": ", ".join(map(str, study.settings.seeds)),
        },
        metric=study.settings.metric,
        statuses=Counter(outcome.status for outcome in distinct(outcomes)),
        failed=[outcome for outcome in distinct(outcomes) if outcome.status.startswith("failed")],
        claims=_claims(findings),
        warnings=warnings,
        contrasts=compared,
        searches=_search_rows(expansion),
        costs=_cost_rows(outcomes),
        pictures=[{"caption": p.caption, "name": p.name, "data": _data_url(p)} for p in pictures],
        tables=[{"label": subject.label, "rows": _variant_rows(subject)} for subject in subjects],
    )


def _range(values: Iterable[int]) -> str:
    known = sorted(set(values))
    if not known:
        return "none yet"
    return f"{known[0]:,}" if len(known) == 1 else f"{known[0]:,} to {known[-1]:,}"


def _search_rows(expansion: Expansion) -> list[dict[str, str]]:
    """The values of every search with their figures, and the one that is used."""
    return [
        {
            "arm": label if variant.preset == REFERENCE else f"{label}, {variant}",
            "metric": search.metric,
            "curve": ", ".join(f"{value:g}: {figure:.4f}" for value, figure in search.curve()),
            "best": "" if search.best is None else f"{search.best:g}",
        }
        for (label, variant), search in expansion.searches.items()
    ]


def _cost_rows(outcomes: Sequence[Outcome]) -> list[dict[str, str]]:
    """Memory of each combination's runs; empty for results of before it was kept. Times are the machine's."""
    rows = []
    for label in dict.fromkeys(outcome.row.label for outcome in outcomes):
        known = [o.finished for o in outcomes if o.row.label == label and o.row.tries is None and o.finished]
        costs = [result.costs for result in known if result.costs]
        if not costs:
            continue

        def mean(name: str, scale: float, costs: Sequence[dict[str, float]] = costs) -> str:
            values = [each[name] for each in costs if name in each]
            return f"{fmean(values) / scale:,.3g}" if values else ""

        rows.append(
            {
                "arm": label,
                "trainables": f"{known[0].trainables:,}",
                "weights": mean("weight_bytes", 2**20),
                "optimizer": mean("optimizer_bytes", 2**20),
                "activations": mean("activation_bytes", 2**20),
            }
        )
    return rows


def _claims(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Findings under their claim's statement, claims in order."""
    claims: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        claims.setdefault((finding.claim, finding.statement), []).append(finding)
    return [{"claim": key[0], "statement": key[1], "findings": found} for key, found in sorted(claims.items())]


def _variant_rows(subject: Subject) -> list[dict[str, str]]:
    rows = []
    for variant, figures in subject.figures.items():
        figure, cost = Estimate(tuple(figures.values())), Estimate(tuple(subject.costs(variant).values()))
        change = subject.sign * cost.mean
        kept = subject.kept[variant]
        rows.append(
            {
                "variant": str(variant),
                "trainables": f"{subject.trainables[variant]:,}",
                "kept": f"{kept['total']:.1%}" if "total" in kept else "",
                "figure": f"{figure.mean:.4f}",
                "change": "" if variant.preset == REFERENCE else number(change),
                "spread": "" if variant.preset == REFERENCE else f"{cost.spread:.2g}",
                "seeds": str(len(figures)),
            }
        )
    return rows


def _data_url(picture: Picture) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(picture.svg).decode()}"
