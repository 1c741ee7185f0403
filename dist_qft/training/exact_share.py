"""Whole numbers of rows and steps from decimal settings, without the error of binary fractions."""

import math
from fractions import Fraction

from dist_qft.config.train_schema import TrainConfig


def run_length(train: TrainConfig, rows: int) -> tuple[int, int]:
    """Optimizer steps and data rows of a run that has so many rows of training data.

    `max_steps` uses whole batches; otherwise the run ends with the last epoch's last row, and the places left over in
    its last batch stay empty.
    """
    if train.max_steps is not None:
        return train.max_steps, train.max_steps * train.global_batch_size
    used = ceil_product(train.num_train_epochs, rows)
    return -(-used // train.global_batch_size), used


def ceil_product(setting: float, count: int) -> int:
    """The product of a decimal setting and a count, rounded up.

    The setting counts as it is written: 1.1 epochs of 100 rows are 110, and not the 111 of 1.1 * 100 in floating point.
    """
    return math.ceil(Fraction(str(setting)) * count)
