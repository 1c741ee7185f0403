"""The word `lossless` of a certificate: the result is the live model but for rounding that is small beside dW."""

from pathlib import Path

import pytest

from dist_qft.config.schema import QuantizationConfig
from dist_qft.merge.certificate import Findings, is_lossless
from dist_qft.merge.difference import Difference
from dist_qft.merge.probe import LogitDifference
from dist_qft.merge.recipe import MergeRequest, Recipe
from dist_qft.methods.adapters.schedule import TileSettings


def exact(merge_aware: bool) -> Recipe:
    settings = {"in_features": 64, "out_features": 64, "pool": 8, "repeat": 8, "rank": 4, "alpha": 8.0, "inner": None}
    tiles = {"q_proj": TileSettings(**settings, merge_aware=merge_aware)}
    return Recipe(MergeRequest("gguf", Path("merged.gguf")), "exact", tiles, {}, QuantizationConfig())


def findings(share: float, logits: float, steps: float = 0.5) -> Findings:
    weights = Difference(maximum=1e-3, steps=steps, squares=share**2, update_squares=1.0)
    return Findings(weights, LogitDifference(logits, logits, 10.0, 2.0, 2.0), [1, 2], [], "bfloat16")


@pytest.mark.parametrize(
    ("merge_aware", "share", "logits", "expected"),
    [
        (False, 0.02, 1e-3, True),
        (False, 0.02, 0.0, True),
        (False, 1.0, 1e-3, False),
        (False, 1.0, 0.0, False),  # dW is rounded away, and 16 bits of a logit do not show it
        (True, 1.0, 0.0, True),  # the live model computes with these zeros
        (True, 1.0, 1e-3, False),
    ],
)
def test_an_exact_merge_is_lossless_if_it_holds_the_update(merge_aware, share, logits, expected):
    assert is_lossless(exact(merge_aware), findings(share, logits)) is expected


def test_zeros_that_are_not_the_nearest_are_not_lossless():
    assert not is_lossless(exact(False), findings(0.02, 0.0, steps=0.7))
