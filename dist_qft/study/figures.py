"""The report's figures. Colours are Okabe and Ito's, which the colour-blind tell apart; markers say the same again."""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dist_qft.study.measurements import Estimate, Subject
from dist_qft.study.presets import REFERENCE, Variant

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_AXIS = {"rank": "rank", "alpha": "alpha", "balance": "balancing factor"}
STYLE: "dict[RcKeyType, Any]" = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture on every machine
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "dist-qft",
}


@dataclass(frozen=True)
class Picture:
    """A figure as files: `name` without ending, and the caption."""

    name: str
    caption: str
    png: bytes
    svg: bytes


@dataclass(frozen=True)
class _Labels:
    """The labels of the vertical axes: of a figure, and of its change."""

    figure: str
    change: str


def draw_all(subjects: Sequence[Subject], metric: str, unit: str, loss_unit: str) -> Iterator[Picture]:
    """Every figure that the measured runs allow, one panel a subject; `unit` is of the metric, or empty."""
    unit = f" ({unit})" if unit else ""
    label = _Labels(
        f"held-out {metric}{unit}", f"change of held-out {metric} against the\nreference of the same seed{unit}"
    )
    presets = dict.fromkeys(variant.preset for subject in subjects for variant in subject.figures)
    with matplotlib.rc_context(STYLE):
        for preset in presets:
            shown = [subject for subject in subjects if subject.variants(preset)]
            if preset.endswith("_by_type"):
                yield _values_figure(shown, preset, label)
            elif preset.endswith("_by_depth"):
                yield _depth_figure(shown, preset, label)
            elif preset == "equal_discount":
                yield _discount_figure(shown, label)
        yield _curves_figure(subjects, loss_unit)


def _values_figure(subjects: Sequence[Subject], preset: str, label: _Labels) -> Picture:
    """Figure against value, a line for each group, the reference among its points."""

    def draw(axes: Axes, subject: Subject, read: Callable[[Variant], Estimate]) -> None:
        own = subject.variants(preset)
        values = sorted({v.value for v in own} | {subject.reference_value(preset)}, key=_order)
        for index, group in enumerate(dict.fromkeys(v.group for v in own)):
            points = {v.value: v for v in own if v.group == group}
            points[subject.reference_value(preset)] = Variant(REFERENCE)
            _line(axes, index, shown(group), [(values.index(v), read(points[v])) for v in values if v in points])
        axes.set_xticks(range(len(values)), values)
        axes.set_xlabel(f"{_axis(preset, subject)} of the group (other layers: {subject.reference_value(preset)})")

    caption = f"{_title(preset)}: one group of layers at a time has another value, all others keep the reference's."
    return _two_rows(preset, caption, subjects, label, draw)


def _depth_figure(subjects: Sequence[Subject], preset: str, label: _Labels) -> Picture:
    """Figure against depth, a line for each value."""

    def draw(axes: Axes, subject: Subject, read: Callable[[Variant], Estimate]) -> None:
        own = subject.variants(preset)
        groups = list(dict.fromkeys(v.group for v in own))
        for index, value in enumerate(dict.fromkeys(v.value for v in own)):
            points = [(groups.index(v.group), read(v)) for v in own if v.value == value]
            _line(axes, index, f"{_axis(preset, subject)} {value}", points)
        reference = read(Variant(REFERENCE))
        name = f"reference ({subject.reference_value(preset)})"
        axes.axhline(reference.mean, color="#444444", linestyle="--", linewidth=1, label=name)
        axes.set_xticks(range(len(groups)), [shown(group) for group in groups])
        axes.set_xlim(-0.4, len(groups) - 0.6)
        axes.set_xlabel("decoder layers with another value")

    caption = f"{_title(preset)}: one part of the depth at a time has another value, all others keep the reference's."
    return _two_rows(preset, caption, subjects, label, draw)


def _two_rows(
    name: str,
    caption: str,
    subjects: Sequence[Subject],
    label: _Labels,
    draw: Callable[[Axes, Subject, Callable[[Variant], Estimate]], None],
) -> Picture:
    """A picture of the figure and, below, of its change against the same seed's reference: small effects show."""
    figure = Figure(figsize=(1.2 + 4.0 * len(subjects), 6.2), layout="constrained")
    grid = figure.subplots(2, len(subjects), squeeze=False)
    for column, subject in enumerate(subjects):
        draw(grid[0][column], subject, partial(_measured, subject))
        draw(grid[1][column], subject, partial(_changed, subject))
        grid[0][column].set_title(shown(subject.label))
        grid[1][column].axhline(0, color="#444444", linewidth=0.8)
        grid[0][column].legend(fontsize=8)
    grid[0][0].set_ylabel(label.figure)
    grid[1][0].set_ylabel(label.change)
    note = " Bars: standard deviation over the seeds; small dots: single seeds."
    return finished_picture(name, caption + note, figure)


def _discount_figure(subjects: Sequence[Subject], label: _Labels) -> Picture:
    figure = Figure(figsize=(1.2 + 4.0 * len(subjects), 3.6), layout="constrained")
    grid = figure.subplots(1, len(subjects), squeeze=False, sharey=True)
    holds = set()
    for axes, subject in zip(grid[0], subjects, strict=True):
        own = subject.variants("equal_discount")
        holds |= {variant.value for variant in own}
        for index, variant in enumerate(own):
            estimate = Estimate(tuple(_changes(subject, variant)))
            axes.bar(index, estimate.mean, 0.6, color=COLOURS[index % len(COLOURS)], alpha=0.75)
            _spread(axes, index, estimate, "black")
        axes.set_xticks(
            range(len(own)), [f"{shown(v.group)}\nkeeps {subject.kept[v]['total']:.1%}" for v in own], fontsize=8
        )
        axes.axhline(0, color="#444444", linewidth=0.8)
        axes.set_title(shown(subject.label))
        axes.set_xlabel("where the trainables are cut; share of all that is kept")
        axes.grid(axis="x", visible=False)
    grid[0][0].set_ylabel(label.change)
    caption = f"Equal discount ({'; '.join(sorted(holds))}): the same cut, taken from one group of layers at a time."
    return finished_picture(
        "equal_discount", f"{caption} Bars: standard deviation over the seeds; dots: single seeds.", figure
    )


def _curves_figure(subjects: Sequence[Subject], unit: str) -> Picture:
    figure = Figure(figsize=(1.2 + 4.0 * len(subjects), 3.6), layout="constrained")
    grid = figure.subplots(1, len(subjects), squeeze=False)
    for axes, subject in zip(grid[0], subjects, strict=True):
        presets = [p for p in dict.fromkeys(v.preset for v in subject.curves) if p != REFERENCE]
        for variant, curves in subject.curves.items():
            longest = max(map(len, curves.values()))  # patience may end the seeds at different steps
            mean = [fmean(losses[step] for losses in curves.values() if step < len(losses)) for step in range(longest)]
            steps = [subject.logged_every[variant] * number for number in range(1, len(mean) + 1)]
            if variant.preset == REFERENCE:
                axes.plot(steps, mean, color="black", linewidth=1.8, label=REFERENCE, zorder=3)
            else:
                axes.plot(steps, mean, color=COLOURS[presets.index(variant.preset) % 6], linewidth=0.7, alpha=0.8)
        for index, preset in enumerate(presets):
            axes.plot([], [], color=COLOURS[index % 6], label=_title(preset).lower())
        axes.set_title(shown(subject.label))
        axes.set_xlabel("optimizer step")
        axes.legend(fontsize=7)
    grid[0][0].set_ylabel(f"training loss ({unit})")
    return finished_picture("loss_curves", "Training loss of every variant, mean over the seeds.", figure)


def _line(axes: Axes, index: int, label: str, points: Sequence[tuple[float, Estimate]]) -> None:
    colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
    places = [place + 0.06 * index for place, _ in points]
    means = [estimate.mean for _, estimate in points]
    axes.plot(places, means, color=colour, marker=marker, markersize=5, linewidth=1.4, label=label)
    for place, (_, estimate) in zip(places, points, strict=True):
        _spread(axes, place, estimate, colour)


def _spread(axes: Axes, place: float, estimate: Estimate, colour: str) -> None:
    """Standard deviation over the seeds, and every seed as a dot."""
    axes.errorbar(place, estimate.mean, estimate.spread, color=colour, capsize=3, linewidth=1)
    axes.scatter([place + 0.08] * len(estimate.per_seed), estimate.per_seed, s=5, color=colour, alpha=0.6, linewidths=0)


def _measured(subject: Subject, variant: Variant) -> Estimate:
    return Estimate(tuple(subject.figures[variant].values()))


def _changed(subject: Subject, variant: Variant) -> Estimate:
    return Estimate(tuple(_changes(subject, variant)))


def _changes(subject: Subject, variant: Variant) -> list[float]:
    """Change of the figure against the reference of the same seed; not turned round where larger is better."""
    return [subject.sign * cost for cost in subject.costs(variant).values()]


def _order(value: str) -> tuple[float, str]:
    """Numbers by size; tiles ("8x4") by the number of weights they cover."""
    size = 1.0
    for part in value.split("x"):
        size *= float(part)
    return size, value


def _axis(preset: str, subject: Subject) -> str:
    if not preset.startswith("balance"):
        return _AXIS[preset.partition("_")[0]]
    return subject.tile_method.balancing_name


def _title(preset: str) -> str:
    return preset.replace("_", " ").capitalize()


def shown(label: str) -> str:
    """A label of the user's as matplotlib is to show it: no formula, and in the legend whatever it begins with."""
    label = label.replace("$", r"\$")
    return f" {label}" if label.startswith("_") else label


def finished_picture(name: str, caption: str, figure: Figure) -> Picture:
    """The figure as the files of a report."""
    png, svg = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=120, metadata={"Software": None})
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return Picture(name, caption, png.getvalue(), svg.getvalue())
