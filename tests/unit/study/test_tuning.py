"""The search for a rate on made-up curves whose best value is known."""

import math

import pytest

from dist_qft.study.stages import TuneSettings
from dist_qft.study.tuning import first_values, search


def settings(**keys) -> TuneSettings:
    return TuneSettings(set={"data.eval_samples": 4}, **keys)


def bowl(best: float):
    return lambda value: 2.0 + abs(math.log(value / best))


@pytest.mark.parametrize(
    ("tries", "values"),
    [(1, [0.1]), (3, [0.05, 0.1, 0.2]), (4, [0.05, 0.1, 0.2, 0.4]), (5, [0.025, 0.05, 0.1, 0.2, 0.4])],
)
def test_the_first_values_lie_around_the_configs(tries, values):
    assert first_values(settings(tries=tries), 0.1) == pytest.approx(values)


@pytest.mark.parametrize(("best", "tried"), [(0.1, 3), (0.4, 5), (0.025, 5)], ids=["inside", "above", "below"])
def test_it_widens_until_the_best_lies_between_others(best, tried):
    found = search(settings(tries=3), 0.1, "loss", bowl(best))
    assert (found.best, found.on_edge, len(found.figures)) == (pytest.approx(best), False, tried)
    assert [value for value, _ in found.curve()] == sorted(found.figures)


def test_it_says_so_where_it_may_not_widen_further():
    found = search(settings(tries=3, widen=1), 0.1, "loss", bowl(10.0))
    assert (found.best, found.on_edge) == (pytest.approx(0.4), True)


def test_larger_is_better_for_an_accuracy():
    found = search(settings(tries=3), 0.1, "accuracy", lambda value: -bowl(0.1)(value))
    assert found.best == pytest.approx(0.1)
    assert search(settings(tries=3), 0.1, "merged_loss", bowl(0.1)).sign == 1


def test_missing_results_leave_it_open_and_failed_ones_never_win():
    known = {0.05: 2.0, 0.1: 1.0}
    assert search(settings(tries=3), 0.1, "loss", known.get).best is None
    failed = search(settings(tries=3), 0.1, "loss", lambda value: math.inf if value > 0.1 else bowl(0.05)(value))
    assert failed.best == pytest.approx(0.05)
    assert search(settings(tries=3), 0.1, "loss", lambda value: math.inf).best is None
