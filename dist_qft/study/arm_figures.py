"""The report's figures of a study's arms: the curves of their searches, and their figures beside each other."""

import math
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from dist_qft.study.figures import COLOURS, MARKERS, Picture, finished_picture, shown
from dist_qft.study.measurements import Estimate, Subject
from dist_qft.study.presets import REFERENCE, Variant
from dist_qft.study.tuning import Search


def tuning_figure(searches: Mapping[tuple[str, Variant], Search], axis: str) -> Picture | None:
    """Figure against the value that was searched, a line for each arm; None before any run of a search is done."""
    curves = {key: search.curve() for key, search in searches.items()}
    if not any(curves.values()):
        return None
    figure = Figure(figsize=(7.0, 4.4), layout="constrained")
    axes = figure.subplots()
    lowest = min(figure for curve in curves.values() for _, figure in curve)
    highest = max(figure for curve in curves.values() for _, figure in curve)
    metrics = list(dict.fromkeys(search.metric for search in searches.values()))
    for index, ((label, variant), curve) in enumerate(curves.items()):
        name = label if variant.preset == REFERENCE else f"{label}, {variant}"
        if len(metrics) > 1:
            name += f": {searches[label, variant].metric}"
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        axes.plot(
            *zip(*curve, strict=True), color=colour, marker=marker, markersize=4, linewidth=1.2, label=shown(name)
        )
        best = searches[label, variant].best
        if best is not None:
            value = dict(curve)[best]
            axes.scatter([best], [value], s=90, facecolors="none", edgecolors=colour, linewidths=1.5, zorder=3)
    axes.set_xscale("log")
    if lowest > 0 and highest > 3 * lowest and math.isfinite(highest):
        axes.set_yscale("log")
    axes.set_xlabel(axis)
    axes.set_ylabel(f"{' or '.join(metrics)} on the search's own data")
    axes.legend(fontsize=7)
    caption = f"The search for {axis}: every value that was tried; a ring marks the one that the comparison uses."
    return finished_picture("tuning", caption, figure)


def arms_figure(subjects: Sequence[Subject], label: str) -> Picture | None:
    """The reference figure of every combination of the axes, with every seed; None for a single one."""
    if len(subjects) < 2:
        return None
    figure = Figure(figsize=(7.0, 1.0 + 0.42 * len(subjects)), layout="constrained")
    axes = figure.subplots()
    for place, subject in enumerate(subjects):
        values = Estimate(tuple(subject.figures[Variant(REFERENCE)].values()))
        colour = COLOURS[place % len(COLOURS)]
        axes.errorbar(values.mean, place, xerr=values.spread, color=colour, marker="o", markersize=5, capsize=3)
        axes.scatter(values.per_seed, [place + 0.18] * len(values.per_seed), s=6, color=colour, alpha=0.6, linewidths=0)
    axes.set_yticks(range(len(subjects)), [shown(subject.label) for subject in subjects])
    axes.invert_yaxis()
    axes.set_xlabel(label)
    caption = "Every combination of the axes. Bars: standard deviation over the seeds; small dots: single seeds."
    return finished_picture("arms", caption, figure)
