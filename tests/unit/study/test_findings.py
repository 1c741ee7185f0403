"""Verdicts on made-up figures whose answer is known, with SciPy as the independent reference for the arithmetic."""

import numpy as np
import pytest
from scipy import stats

from dist_qft.config.methods.door import make_method
from dist_qft.study.findings import FAILS, HOLDS, OPEN, _mean_square, find
from dist_qft.study.measurements import Estimate, Subject
from dist_qft.study.presets import REFERENCE, Variant

SEEDS = range(5)


def subject(
    effects: dict[tuple[str, str, str], float], *, noise: float, method: str = "qbara", sign: int = 1
) -> Subject:
    """Figures of 5 seeds: a level of the seed, the effect of the variant, and noise."""
    random = np.random.default_rng(3)
    made = Subject("text", make_method(name=method, rank=8), sign)
    levels = random.normal(2.0, 0.5, len(SEEDS))
    for key, effect in {(REFERENCE, "", ""): 0.0, **effects}.items():
        variant = Variant(*key)
        values = levels + sign * effect + random.normal(0, noise, len(SEEDS))
        made.figures[variant] = dict(zip(SEEDS, values.tolist(), strict=True))
        made.kept[variant] = {"total": 1.0 if key[0] in (REFERENCE, "balance_by_type", "balance_by_depth") else 0.8}
    return made


def verdicts(made: Subject) -> dict[str, str]:
    return {finding.claim: finding.verdict for finding in find([made], "nats")}


def by_rank(attention: float, mlp: float) -> dict[tuple[str, str, str], float]:
    costs = {"attention": attention, "mlp": mlp}
    return {("rank_by_type", group, rank): cost for group, cost in costs.items() for rank in ("1", "4")}


@pytest.mark.parametrize("sign", [1, -1], ids=["loss", "accuracy"])
def test_claim_1_with_its_three_verdicts(sign):
    assert verdicts(subject(by_rank(0.2, 0.1), noise=0.005, sign=sign)) == {"1": HOLDS}
    assert verdicts(subject(by_rank(0.1, 0.2), noise=0.005, sign=sign)) == {"1": FAILS}
    assert verdicts(subject(by_rank(0.1, 0.1), noise=0.05, sign=sign)) == {"1": OPEN}


def test_a_level_that_differs_between_seeds_is_no_spread():
    finding = find([subject(by_rank(0.2, 0.1), noise=0.0)], "nats")[0]
    assert finding.estimate.mean == pytest.approx(0.1)
    assert finding.estimate.spread == pytest.approx(0.0, abs=1e-12)


def test_claim_3_is_for_quantization_aware_methods():
    assert verdicts(subject(by_rank(0.2, 0.1), noise=0.005, method="qalora")) == {"3": HOLDS}
    tiles = {("balance_by_type", group, "8x8"): cost for group, cost in (("attention", 0.2), ("mlp", 0.1))}
    assert verdicts(subject(by_rank(0.2, 0.1), noise=0.005, method="qablora")) == {"3": HOLDS}
    made = subject(tiles, noise=0.005, method="qahira")
    assert verdicts(made) == {}  # a tile that cuts nothing is no smaller adapter
    for variant in made.figures:
        made.kept[variant] = {"total": 0.8}
    assert verdicts(made) == {"3": HOLDS}


@pytest.mark.parametrize(
    ("value", "group", "verdict"), [(0.2, 0.02, HOLDS), (0.02, 0.2, FAILS), (0.0, 0.0, OPEN)], ids=str
)
def test_claim_2_by_type(value, group, verdict):
    table = {
        ("balance_by_type", name, factor): row * group + column * value
        for row, name in enumerate(("attention", "mlp"))
        for column, factor in enumerate(("1", "4"))
    }
    assert verdicts(subject(table, noise=0.004)) == {"2 (type)": verdict}


def test_claims_of_type_over_depth_and_of_equal_discount():
    cuts = by_rank(0.3, 0.1) | {("rank_by_depth", name, "1"): 0.15 for name in ("early", "middle", "late")}
    cuts |= {("equal_discount", "attention", "0.25 absolute"): 0.2, ("equal_discount", "mlp", "0.25 absolute"): 0.1}
    found = verdicts(subject(cuts, noise=0.005))
    assert found == {"1": HOLDS, "4 (type over depth)": HOLDS, "5 (equal discount)": HOLDS}


def test_the_interval_is_students():
    values = (0.3, 0.1, 0.25, 0.2)
    estimate = Estimate(values)
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (estimate.low, estimate.high) == pytest.approx((low, high))


def test_one_seed_tells_nothing_and_says_so():
    made = subject(by_rank(0.9, 0.1), noise=0.0)
    for figures in made.figures.values():
        for seed in list(figures)[1:]:
            del figures[seed]
    finding = find([made], "nats")[0]
    assert finding.verdict == OPEN
    assert "one seed gives no interval" in finding.sentence


def test_the_mean_square_is_that_of_the_analysis_of_variance():
    table = np.random.default_rng(0).normal(size=(3, 4))
    within = table.var(axis=1, ddof=1).mean()
    assert _mean_square(table.tolist()) / within == pytest.approx(stats.f_oneway(*table).statistic)


def test_a_sentence_has_effect_interval_spread_and_verdict():
    made = Subject("stdlib-docs", make_method(name="qlora"), 1)
    known = {(REFERENCE, "", ""): (1.0, 1.0), ("rank_by_type", "attention", "1"): (1.3, 1.5)}
    known[("rank_by_type", "mlp", "1")] = (1.1, 1.1)
    for key, values in known.items():
        made.figures[Variant(*key)] = dict(enumerate(values))
        made.kept[Variant(*key)] = {"total": 0.5}
    assert find([made], "nats per token")[0].sentence == (
        "stdlib-docs: the cost of a smaller adapter (rank 1) in attention minus that in MLP is +0.3 nats per token "
        "(95 % interval -0.971 to +1.57, standard deviation 0.141 over 2 seeds): claim 1 cannot be told."
    )


def test_discounts_of_different_size_are_not_mixed():
    costs = {("attention", "0.2"): 0.1, ("mlp", "0.2"): 0.05, ("attention", "0.4"): 0.5}
    effects = {("equal_discount", group, f"{share} absolute"): cost for (group, share), cost in costs.items()}
    (found,) = find([subject(effects, noise=0.0)], "nats")
    assert "discount of 0.2 (absolute)" in found.contrast and found.estimate.mean == pytest.approx(0.05)
    effects["equal_discount", "mlp", "0.4 absolute"] = 0.2
    both = find([subject(effects, noise=0.0)], "nats")
    assert [finding.estimate.mean for finding in both] == pytest.approx([0.05, 0.3])
