"""NaN and infinity: no figure of a merge hides them, and no comparison passes them."""

import math

import pytest
import torch

from dist_qft.errors import CorruptFileError, NumericError, UserError
from dist_qft.merge.difference import Difference, larger
from dist_qft.merge.merged_weight import require_range
from dist_qft.merge.probe import compare_logits
from dist_qft.merge.verify import _require_close

BAD = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("place", [0, 2])
def test_a_difference_keeps_what_is_not_finite(bad, place):
    values = torch.ones(3, dtype=torch.float64)
    written = values.clone()
    written[place] = bad
    found = Difference()
    found.add(written, values, torch.zeros_like(values))
    found.add(values, values)
    assert not found.finite and not (Difference() + found).finite and not (found + Difference(1.0)).finite
    folds = Difference()
    folds.add_fold(torch.zeros(3).half(), torch.ones(3).half(), written)
    assert not folds.finite
    assert Difference(1.0, 2.0, 3, 0.5, 1.0, 1.0).finite


def test_the_larger_of_a_number_and_nan_is_nan():
    assert math.isnan(larger(0.0, math.nan)) and math.isnan(larger(math.nan, 0.0)) and larger(1.0, 2.0) == 2.0


@pytest.mark.parametrize("bad", BAD)
def test_logits_that_are_not_finite_show(bad):
    live, other = torch.zeros(3, 5), torch.zeros(3, 5)
    other[1, 2] = bad
    assert not compare_logits(live, other, [0, 1, 2]).finite
    assert not compare_logits(other, live, [0, 1, 2]).finite


@pytest.mark.parametrize(("found", "said"), [(math.nan, 0.0), (0.0, math.nan), (math.inf, 1.0), (math.inf, math.inf)])
def test_figures_are_close_only_if_they_are_numbers(found, said):
    with pytest.raises(CorruptFileError):
        _require_close("weights", found, said, 1e-9)
    _require_close("weights", 1.0, 1.04, 0.0)


def test_sums_that_are_not_finite_are_a_numeric_error_and_those_too_large_are_not():
    exact = torch.tensor([1.0, 1e6], dtype=torch.float64)
    with pytest.raises(UserError, match="leave the range of float16"):
        require_range(exact.half(), exact, "q")
    require_range(exact.bfloat16(), exact, "q")
    for bad in BAD:
        exact[1] = bad
        with pytest.raises(NumericError):
            require_range(exact.half(), exact, "q")
