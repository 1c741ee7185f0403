"""Line charts as SVG inside a page: coloured by the page's style, no script, no other file."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 640, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 24, 36
_MOST_POINTS = 800  # of a curve: more than the chart has pixels
_SMALLEST = 1e-290  # values below are zero in a picture; differences of still smaller ones lose their digits
_MARKED = 40  # curves of so few points show each of them


@dataclass(frozen=True)
class Curve:
    """Points (x, y) of finite numbers, x ascending, under a label."""

    label: str
    points: Points


def line_chart(curves: Sequence[Curve], x_label: str, y_label: str) -> Markup:
    """A chart of one or two curves; empty markup if they have no points."""
    points = [point for curve in curves for point in curve.points]
    if not points:
        return Markup("")
    x_axis = _Axis.of([x for x, _ in points], _LEFT, _WIDTH - _RIGHT)
    y_axis = _Axis.of([y for _, y in points], _HEIGHT - _BOTTOM, _TOP)
    parts = [
        Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{} by {}">').format(_WIDTH, _HEIGHT, y_label, x_label)
    ]
    for y in y_axis.ticks:
        parts.append(
            Markup(
                '<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
                '<text x="{}" y="{:.1f}" text-anchor="end">{}</text>'
            ).format(_LEFT, _WIDTH - _RIGHT, y_axis.at(y), y_axis.at(y), _LEFT - 6, y_axis.at(y) + 4, f"{y:.4g}")
        )
    for x in x_axis.ticks:
        text = Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>')
        parts.append(text.format(x_axis.at(x), _HEIGHT - _BOTTOM + 16, f"{x:,.6g}"))
    parts.append(Markup('<text x="{}" y="14">{}</text>').format(_LEFT, y_label))
    parts.append(
        Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(_WIDTH - _RIGHT, _HEIGHT - 4, x_label)
    )
    for number, curve in enumerate(curves):
        parts.append(_curve(curve, number, x_axis, y_axis))
        if len(curves) > 1:
            label = Markup('<text class="c{}" x="{}" y="14" text-anchor="end">{}</text>')
            parts.append(label.format(number, _WIDTH - _RIGHT - 110 * (len(curves) - 1 - number), curve.label))
    return Markup("").join([*parts, Markup("</svg>")])


def _curve(curve: Curve, number: int, x_axis: "_Axis", y_axis: "_Axis") -> Markup:
    places = [(x_axis.at(x), y_axis.at(y)) for x, y in _thinned(curve.points)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    drawn = Markup('<polyline class="curve c{}" points="{}"/>').format(number, path)
    if len(places) <= _MARKED:
        dot = Markup('<circle class="c{}" cx="{:.1f}" cy="{:.1f}" r="3"><title>{}</title></circle>')
        marks = [
            dot.format(number, *place, f"{curve.label} {y:.6g} at {x:,.6g}")
            for place, (x, y) in zip(places, curve.points, strict=True)
        ]
        drawn += Markup("").join(marks)
    return drawn


def _thinned(points: Points) -> Points:
    """At most `_MOST_POINTS` points: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(points) <= _MOST_POINTS:
        return points
    stretch = math.ceil(len(points) / (_MOST_POINTS // 2))
    kept = []
    for first in range(0, len(points), stretch):
        part = points[first : first + stretch]
        ends = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        kept.extend(sorted(ends))
    return kept


@dataclass(frozen=True)
class _Axis:
    """Values from `low` to `high` between two places of the picture."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float], start: float, end: float) -> "_Axis":
        low, high = min(values), max(values)
        size = max(abs(low), abs(high))
        if high - low <= 1e-12 * size or size < _SMALLEST:  # no step between two such values can be shown
            margin = size / 2 if size >= _SMALLEST else 0.5
            low, high = low - margin, high + margin
        step = _round_step((high - low) / 4)
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        return cls(low, high, start, end, tuple(number * step for number in range(first, last + 1)))

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _round_step(step: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))
