"""Whole numbers of rows and steps from decimal settings, without the error of binary fractions."""

import math
from fractions import Fraction


def ceil_product(setting: float, count: int) -> int:
    """The product of a decimal setting and a count, rounded up.

    The setting counts as it is written: 1.1 epochs of 100 rows are 110, and not the 111 of 1.1 * 100 in floating point.
    """
    return math.ceil(Fraction(str(setting)) * count)
