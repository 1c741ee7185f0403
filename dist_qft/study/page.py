"""The report as one HTML page that needs no other file: figures inside, findings in words, every variant in a table."""

import base64
from collections import Counter
from collections.abc import Sequence
from typing import Any

from dist_qft.pages import render
from dist_qft.study.figures import Picture
from dist_qft.study.findings import Finding, number
from dist_qft.study.measurements import Estimate, Subject
from dist_qft.study.presets import REFERENCE
from dist_qft.study.results import Outcome
from dist_qft.study.settings import Study


def make_page(
    study: Study,
    outcomes: Sequence[Outcome],
    subjects: Sequence[Subject],
    findings: Sequence[Finding],
    pictures: Sequence[Picture],
) -> str:
    """The page's HTML."""
    config = study.base
    return render(
        __package__,
        "page.html.jinja",
        title=study.title,
        command=f"dist-qft study {study.document.path}",
        base={
            "model": config.model.path,
            "linear layers": config.quantization.linear,
            "method": config.method.name,
            "steps": config.train.max_steps or f"{config.train.num_train_epochs:g} epochs",
            "samples per step": config.train.global_batch_size,
            "learning rate": f"{config.train.learning_rate:g}",
            "seeds": ", ".join(map(str, study.settings.seeds)),
        },
        metric=study.settings.metric,
        statuses=Counter(outcome.status for outcome in outcomes),
        failed=[outcome for outcome in outcomes if outcome.status.startswith("failed")],
        claims=_claims(findings),
        pictures=[{"caption": p.caption, "name": p.name, "data": _data_url(p)} for p in pictures],
        tables=[{"label": subject.label, "rows": _variant_rows(subject)} for subject in subjects],
    )


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
