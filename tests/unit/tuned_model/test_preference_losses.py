"""The losses of preference tuning against their formulas in plain Python."""

import math

import pytest
import torch

from dist_qft.config.preference_faults import _LOSSES
from dist_qft.tuned_model.preference_losses import Ratios, kto_losses, odds_ratio, pair_losses

BETA, EPSILON = 0.3, 0.1


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# Of a pair's log-ratios c and r over answers of m and n tokens.
FORMULAS = {
    "sigmoid": lambda c, r, m, n: -math.log(s(BETA * (c - r))),
    "sigmoid_norm": lambda c, r, m, n: -math.log(s(BETA * (c / m - r / n))),
    "hinge": lambda c, r, m, n: max(0.0, 1 - BETA * (c - r)),
    "ipo": lambda c, r, m, n: (c / m - r / n - 1 / (2 * BETA)) ** 2,
    "robust": lambda c, r, m, n: (
        (-(1 - EPSILON) * math.log(s(BETA * (c - r))) + EPSILON * math.log(s(-BETA * (c - r)))) / (1 - 2 * EPSILON)
    ),
    "exo_pair": lambda c, r, m, n: (
        s(BETA * (c - r)) * (math.log(s(BETA * (c - r))) - math.log(1 - EPSILON))
        + s(BETA * (r - c)) * (math.log(s(BETA * (r - c))) - math.log(EPSILON))
    ),
    "nca_pair": lambda c, r, m, n: -math.log(s(BETA * c)) - 0.5 * math.log(s(-BETA * c)) - 0.5 * math.log(s(-BETA * r)),
    "bco_pair": lambda c, r, m, n: -math.log(s(BETA * c)) - math.log(s(-BETA * r)),
    "sppo_hard": lambda c, r, m, n: (c - 0.5 / BETA) ** 2 + (r + 0.5 / BETA) ** 2,
    "apo_zero": lambda c, r, m, n: 1 - s(BETA * c) + s(BETA * r),
    "apo_down": lambda c, r, m, n: s(BETA * c) + 1 - s(BETA * (c - r)),
}
CHOSEN, REJECTED, LENGTHS = [1.5, -2.0, 0.0], [-1.0, 3.0, 0.0], ([3, 4, 5], [6, 2, 5])


def test_every_loss_of_pairs_is_its_formula():
    assert FORMULAS.keys() == set(_LOSSES["dpo"])
    tensors = [torch.tensor(values, dtype=torch.float64) for values in (CHOSEN, REJECTED, *LENGTHS)]
    for kind, formula in FORMULAS.items():
        found = pair_losses(kind, Ratios(*tensors), BETA, EPSILON).tolist()
        assert found == pytest.approx([formula(*values) for values in zip(CHOSEN, REJECTED, *LENGTHS, strict=True)])


def test_losses_of_rated_answers_and_the_odds_ratio():
    ratios, wanted, kl = torch.tensor([1.5, -2.0]).double(), torch.tensor([True, False]), torch.tensor(0.4).double()
    expected = [1 - s(BETA * (1.5 - 0.4)), 1 - s(BETA * (0.4 + 2.0))]
    assert kto_losses("kto", ratios, wanted, kl, BETA).tolist() == pytest.approx(expected)
    expected = [1 - s(BETA * 1.5), s(-BETA * 2.0)]
    assert kto_losses("apo_zero_unpaired", ratios, wanted, kl, BETA).tolist() == pytest.approx(expected)
    # From answers that are all but certain to all but impossible ones, where exp(x) or 1 - exp(x) has no digits.
    better, worse = torch.tensor([-1e-6, -0.5, -3.0, -80.0]).double(), torch.tensor([-2.0, -1e-6, -90.0, -5.0]).double()
    better.requires_grad_()
    found = odds_ratio(better, worse)
    found.sum().backward()
    for value, gradient, b, w in zip(
        found.tolist(), better.grad.tolist(), better.tolist(), worse.tolist(), strict=True
    ):
        assert value == pytest.approx((b - math.log(-math.expm1(b))) - (w - math.log(-math.expm1(w))), rel=1e-9)
        assert gradient == pytest.approx(-1 / math.expm1(b), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("certain", [0.0, 1e-9, -1e-45])  # sums of rounded terms may end above 0
def test_the_odds_of_a_certain_answer_are_finite(dtype, certain):
    """Both ways around, beside a pair with figures of its own, whose value and gradient stay."""
    better = torch.tensor([certain, -2.0, -0.5], dtype=dtype, requires_grad=True)
    worse = torch.tensor([-2.0, certain, -3.0], dtype=dtype, requires_grad=True)
    found = odds_ratio(better, worse)
    limit = -torch.finfo(dtype).eps
    log_odds = [x - math.log(-math.expm1(x)) for x in (limit, -2.0, -0.5, -3.0)]
    expected = [log_odds[0] - log_odds[1], log_odds[1] - log_odds[0], log_odds[2] - log_odds[3]]
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    (-torch.nn.functional.logsigmoid(found)).sum().backward()
    slopes = [-1 / (1 + math.exp(value)) for value in expected]  # of the loss by the log-odds
    assert better.grad.tolist() == pytest.approx([0, *(slopes[i] / -math.expm1(x) for i, x in ((1, -2), (2, -0.5)))])
    assert worse.grad.tolist() == pytest.approx([slopes[0] / math.expm1(-2), 0, slopes[2] / math.expm1(-3)], rel=1e-5)
