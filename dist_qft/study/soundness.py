"""Reasons why a study decides little: few held-out tokens, runs far from their end, rates that were not tuned."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from dist_qft.study.presets import REFERENCE, Variant
from dist_qft.study.result_file import Result
from dist_qft.study.results import Outcome
from dist_qft.study.settings import Study
from dist_qft.study.tuning import Search

FEWEST_TOKENS = 50_000
_PARTS = 5  # of a run, by steps
_PLATEAU = 0.05  # share of what was learned that the last part may still add


def warnings_of(study: Study, outcomes: Sequence[Outcome], searches: Mapping[tuple[str, Variant], Search]) -> list[str]:
    """One sentence for each reason."""
    compared = [outcome for outcome in outcomes if outcome.row.tries is None and outcome.finished]
    found: list[str] = []
    tokens = [o.finished.eval_tokens for o in compared if o.finished and o.finished.tuned]
    if study.base.task.name == "causal-lm" and tokens and min(tokens) < FEWEST_TOKENS:
        found.append(f"{min(tokens):,} held-out tokens: below {FEWEST_TOKENS:,} a difference may be that of the texts")
    if study.settings.tune is None:
        found.append("the learning rate was not tuned for each method: at another one the order may be another")
    for (label, variant), search in searches.items():
        arm = label if variant.preset == REFERENCE else f"{label}, {variant}"
        if search.on_edge:
            found.append(f"{arm}: the best value that was tried, {search.best:g}, is the first or last of them")
        elif search.best is None and all(figure is not None for figure in search.figures.values()):
            found.append(f"{arm}: every value that was tried failed")
    for label in dict.fromkeys(outcome.row.label for outcome in compared):
        gain = _last_gain([o for o in compared if o.row.label == label])
        if gain is not None and gain > _PLATEAU:
            found.append(
                f"{label}: the last fifth of the reference's steps still brought {gain:.0%} of what it learned: "
                "it is not on a plateau, and differences may be differences of speed"
            )
    return found


def _last_gain(outcomes: Sequence[Outcome]) -> float | None:
    """The share of what was learned that the last fifth of the steps brought; None if too little is known.

    Of held-out loss where the runs evaluated on the way, else of training loss: the mean over the reference's runs,
    whose batches differ, because single steps are too noisy.
    """
    results = [
        outcome.finished
        for outcome in outcomes
        if outcome.finished and any(variant.preset == REFERENCE for variant in outcome.row.variants)
    ]
    held_out = [gain for result in results if (gain := _last_held_out_gain(result)) is not None]
    if results and len(held_out) == len(results):
        return fmean(held_out)
    curves = [result.history for result in results]
    if not curves or min(map(len, curves)) < 2 * _PARTS:
        return None
    length = min(map(len, curves))
    mean = [fmean(curve[step] for curve in curves) for step in range(length)]
    part = length // _PARTS
    first, before, last = mean[0], fmean(mean[-2 * part : -part]), fmean(mean[-part:])
    return (before - last) / (first - last) if first > last and math.isfinite(first) else None


def _last_held_out_gain(result: Result) -> float | None:
    """The share of a run's fall in held-out loss that came after the last evaluation in four fifths of its steps."""
    steps = max((step for step, _ in result.held_out), default=0)
    before = [loss for step, loss in result.held_out if step * _PARTS <= steps * (_PARTS - 1)]
    first, last = result.base.get("loss", math.nan), result.tuned.get("loss", math.nan)
    return (before[-1] - last) / (first - last) if before and first > last else None
