"""Charts: every point lies inside the picture, extremes survive the thinning, and labels cannot become markup."""

import re
from xml.etree import ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dist_qft.pages.chart import Curve, line_chart

numbers = st.floats(-1e12, 1e12, allow_nan=False)


def places(svg: str) -> list[tuple[float, float]]:
    return [
        (float(x), float(y))
        for points in re.findall(r'points="([^"]*)"', svg)
        for x, y in re.findall(r"(\S+),(\S+)", points)
    ]


@given(st.lists(numbers, min_size=1, max_size=60))
@example([5e-324])
@example([0.0, 1e-300, 5e-324])
@example([1.0, 1.0 + 2**-52])
@example([7.0, 7.0])
def test_every_point_lies_inside_the_picture(values):
    svg = line_chart([Curve("loss", list(enumerate(values)))], "step", "nats")
    ElementTree.fromstring(svg)
    found = places(svg)
    assert len(found) == len(values)
    assert all(64 <= x <= 624 and 24 <= y <= 204 for x, y in found)


def test_a_long_curve_keeps_its_spikes():
    values = [0.0] * 100_000
    values[77_777], values[12_345] = 9.0, -3.0
    svg = line_chart([Curve("loss", list(enumerate(values)))], "step", "nats")
    heights = [y for _, y in places(svg)]
    assert len(heights) <= 800
    assert (min(heights), max(heights)) == (24.0, 204.0)


@pytest.mark.parametrize("curves", [[], [Curve("loss", [])]])
def test_no_points_give_no_chart(curves):
    assert line_chart(curves, "step", "nats") == ""


def test_a_label_is_text():
    svg = line_chart([Curve("<script>", [(1, 2.0)]), Curve("b", [(1, 3.0)])], "<b>", '"')
    assert "<script>" not in svg and "<b>" not in svg
    ElementTree.fromstring(svg)
