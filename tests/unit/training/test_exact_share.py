"""Rows and steps from decimal settings: rounded up from what is written, not from its binary neighbour."""

import pytest

from dist_qft.config.schema import TrainConfig
from dist_qft.training.exact_share import ceil_product
from dist_qft.training.optimizer import learning_rate, warmup_steps


@pytest.mark.parametrize(
    ("setting", "count", "whole"),
    [
        (1.1, 100, 110),
        (0.07, 100, 7),
        (0.55, 100, 55),
        (0.3, 5, 2),
        (1e-7, 10, 1),
        (0.0, 10, 0),
        (3.0, 10**17 + 1, 3 * 10**17 + 3),
    ],
)
def test_the_product_is_rounded_up_from_what_is_written(setting, count, whole):
    assert ceil_product(setting, count) == whole


def test_ratios_that_give_whole_numbers_of_steps_give_no_step_more():
    assert warmup_steps(TrainConfig(warmup_ratio=0.07), 100) == 7
    assert warmup_steps(TrainConfig(warmup_ratio=0.07, warmup_steps=3), 100) == 3
    config = TrainConfig(
        learning_rate=1.0, lr_scheduler_type="warmup_stable_decay", warmup_steps=0, decay_ratio=0.07, min_lr_ratio=0.1
    )
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates.count(1.0) == 94, "the first of the last 7 steps still has the full rate"
