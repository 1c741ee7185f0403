"""Contrasts of a study's combinations of axes: the effect, two intervals, and a verdict.

One interval is over the seeds (Student's t, paired by seed), the other over the held-out rows (bootstrap; the same rows
are drawn for all seeds and both sides). A contrast decides only if both exclude 0: another draw of initial values, or
of texts, would have said the same. Its p value is the larger of the two; of all contrasts that are not primary it is
corrected after Holm (1979).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np
from scipy import stats

from dist_qft.study.findings import FAILS, HOLDS, OPEN, number
from dist_qft.study.measurements import CONFIDENCE, Estimate
from dist_qft.study.presets import REFERENCE
from dist_qft.study.result_file import Result, read_rows
from dist_qft.study.results import Outcome
from dist_qft.study.settings import Study
from dist_qft.study.stages import Contrast
from dist_qft.study.tuning import sign_of
from dist_qft.tuned_model.held_out import RowScore

_RESAMPLES = 4000


@dataclass(frozen=True)
class Compared:
    """The answer to one contrast.

    Attributes:
        figures: the figure of each side.
        effect: by seed; positive speaks for the claim, without its margin.
        rows: the interval over the held-out rows; None where the figure has no rows.
        share: the effect as a share of what training gained on the other side; None if that is unknown.
        p: of the hypothesis that the effect and the margin cancel; `adjusted` for the number of questions.
    """

    contrast: Contrast
    figures: tuple[str, str]
    means: tuple[float, float]
    effect: Estimate
    rows: tuple[float, float] | None
    share: float | None
    p: float
    adjusted: float

    @property
    def verdict(self) -> str:
        if not self.adjusted < 1 - CONFIDENCE:
            return OPEN
        return HOLDS if self.effect.mean + self.contrast.margin > 0 else FAILS

    @property
    def sentence(self) -> str:
        """The answer in words."""
        c, e = self.contrast, self.effect
        seeds = "one seed gives no interval"
        if len(e.per_seed) > 1:
            seeds = f"95 % over {len(e.per_seed)} seeds {number(e.low)} to {number(e.high)}"
        rows = "" if self.rows is None else f"; over rows {number(self.rows[0])} to {number(self.rows[1])}"
        share = "" if self.share is None else f"; {self.share:+.1%} of what '{c.than}' gained"
        margin = f", with a margin of {c.margin:g}" if c.margin else ""
        which = "primary" if c.primary else f"p {self.adjusted:.2g} after Holm"
        figure = self.figures[0] if self.figures[0] == self.figures[1] else " against ".join(self.figures)
        return (
            f"{c.better} against {c.than} ({figure}): {number(e.mean)} ({seeds}{rows}{share}{margin}; {which}): "
            f"{self.verdict}"
        )


def compare(study: Study, outcomes: Sequence[Outcome]) -> list[Compared]:
    """Every contrast for which there are runs, secondary ones corrected for the number of all in the file."""
    found = [made for c in study.settings.contrasts if (made := _compared(c, study.settings.metric, outcomes))]
    secondary = [made for made in found if not made.contrast.primary]
    unanswered = sum(not c.primary for c in study.settings.contrasts) - len(secondary)
    corrected = iter(holm([*(made.p for made in secondary), *([1.0] * unanswered)]))
    return [made if made.contrast.primary else replace(made, adjusted=next(corrected)) for made in found]


def unanswered(study: Study, compared: Sequence[Compared]) -> list[str]:
    """One sentence for each contrast that has no runs yet, or whose runs failed."""
    answered = [each.contrast for each in compared]
    return [
        f"{c.better} against {c.than} ({' against '.join(dict.fromkeys(c.figures(study.settings.metric)))}): no seed "
        "has a run of both that is done"
        for c in study.settings.contrasts
        if c not in answered
    ]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the given order."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _compared(contrast: Contrast, metric: str, outcomes: Sequence[Outcome]) -> Compared | None:
    figures = contrast.figures(metric)
    sides = [
        _reference_runs(outcomes, label, figure)
        for label, figure in zip((contrast.better, contrast.than), figures, strict=True)
    ]
    seeds = sorted(sides[0].keys() & sides[1].keys())
    if not seeds:
        return None
    sign = sign_of(figures[0])
    values = [[side[seed][1].tuned[figure] for seed in seeds] for side, figure in zip(sides, figures, strict=True)]
    effect = Estimate(tuple(sign * (than - better) for better, than in zip(*values, strict=True)))
    gains = [_gain(sides[1][seed][1], figures[1]) for seed in seeds]
    gained = None if any(g is None for g in gains) else fmean(g for g in gains if g is not None)
    draws = _resampled(sides, figures, seeds)
    p = max(seeds_p(effect, contrast.margin), 0.0 if draws is None else _rows_p(draws, contrast.margin))
    rows = None
    if draws is not None:
        low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        rows = float(low), float(high)
    share = effect.mean / gained if gained else None
    return Compared(contrast, figures, (fmean(values[0]), fmean(values[1])), effect, rows, share, p, p)


def _reference_runs(outcomes: Sequence[Outcome], label: str, figure: str) -> dict[int, tuple[Outcome, Result]]:
    """The finished reference runs of a combination of the axes that have the figure, by seed."""
    return {
        outcome.row.config.train.seed: (outcome, outcome.finished)
        for outcome in outcomes
        if outcome.row.tries is None
        and outcome.row.label == label
        and any(variant.preset == REFERENCE for variant in outcome.row.variants)
        and outcome.finished is not None
        and figure in outcome.finished.tuned
    }


def _gain(result: Result, figure: str) -> float | None:
    """The improvement of a run's figure by training; a merged file's loss is compared with the live base's."""
    base = result.base.get(figure.removeprefix("merged_"))
    return None if base is None else sign_of(figure) * (base - result.tuned[figure])


def seeds_p(effect: Estimate, margin: float) -> float:
    """Two-sided p value of Student's t over the seeds; 1 for a single seed."""
    count = len(effect.per_seed)
    if count < 2:
        return 1.0
    if effect.spread == 0:
        return 0.0 if effect.mean + margin else 1.0
    t = (effect.mean + margin) / (effect.spread / math.sqrt(count))
    return float(2 * stats.t.sf(abs(t), count - 1))


def _resampled(
    sides: Sequence[dict[int, tuple[Outcome, Result]]], figures: tuple[str, str], seeds: Sequence[int]
) -> np.ndarray | None:
    """Effects (resamples,) under draws of the held-out rows; None where a figure has no rows."""
    differences: list[np.ndarray] = []
    weights = np.empty(0)
    for seed in seeds:
        parts = []
        for side, figure in zip(sides, figures, strict=True):
            part = _row_figures(read_rows(side[seed][0].row.folder, _source(figure)), figure)
            if part is None:
                return None
            parts.append(part)
        (better, weights), (than, others) = parts
        if not np.array_equal(weights, others):  # other held-out data
            return None
        differences.append(than - better)
    return bootstrap(np.mean(differences, axis=0), weights)


def bootstrap(differences: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """sum(differences) / sum(weights) over `_RESAMPLES` draws of the rows with replacement; both are (rows,)."""
    generator, count = np.random.default_rng(0), len(weights)
    draws = np.empty(_RESAMPLES)
    for index in range(_RESAMPLES):
        chosen = generator.integers(0, count, count)
        draws[index] = differences[chosen].sum() / weights[chosen].sum()
    return draws


def _rows_p(draws: np.ndarray, margin: float) -> float:
    """Two-sided p value of the bootstrap: never below the reciprocal of the number of draws."""
    side = min((draws + margin <= 0).mean(), (draws + margin >= 0).mean())
    return float(max(2 * side, 1 / len(draws)))


def _source(figure: str) -> str:
    return "merged" if figure.startswith("merged_") else "tuned"


def _row_figures(rows: dict[int, RowScore], figure: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Each row's part of a figure, the smaller the better, and its weight in the mean; None without rows for it."""
    scores = [rows[row] for row in sorted(rows)]
    if not scores:
        return None
    if figure in ("loss", "merged_loss"):
        return np.array([s.loss for s in scores]), np.array([float(s.targets) for s in scores])
    if figure == "accuracy" and all(s.predicted is not None for s in scores):
        return np.array([float(s.predicted != s.label) for s in scores]), np.ones(len(scores))
    return None
