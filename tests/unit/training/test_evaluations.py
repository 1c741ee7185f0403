"""The better one of two evaluations."""

import pytest

from dist_qft.config.schema import EvaluationConfig
from dist_qft.training.evaluations import is_better
from dist_qft.tuned_model.held_out import HeldOut


@pytest.mark.parametrize(
    ("settings", "best", "better"),
    [
        ({}, None, True),
        ({}, 1.1, True),
        ({}, 1.0, False),
        ({}, 0.9, False),
        ({"early_stopping_threshold": 0.2}, 1.1, False),
        ({"metric": "accuracy"}, 0.7, True),
        ({"metric": "accuracy"}, 0.8, False),
        ({"metric": "accuracy", "early_stopping_threshold": 0.2}, 0.7, False),
    ],
)
def test_less_loss_or_more_of_a_metric_by_more_than_the_threshold(settings, best, better):
    held_out = HeldOut(loss=1.0, tokens=3, metrics={"accuracy": 0.8})
    assert is_better(held_out, best, EvaluationConfig(**settings)) is better
