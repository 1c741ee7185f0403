"""How far written weights lie from the exact sums, collected over layers and ranks."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Difference:
    """Distance between weights as written and as they should be.

    Only exact folds count `steps`, the largest distance in units of the float16 step at the value written, and the
    sums of squares of the distances and of dW itself.
    """

    maximum: float = 0.0
    total: float = 0.0
    count: int = 0
    steps: float = 0.0
    squares: float = 0.0
    update_squares: float = 0.0

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0

    @property
    def share_of_update(self) -> float:
        """Root mean square of the distances over that of dW: how much of what was learned the rounding takes."""
        return math.sqrt(self.squares / self.update_squares) if self.update_squares else 0.0

    def __add__(self, other: "Difference") -> "Difference":
        return Difference(
            max(self.maximum, other.maximum),
            self.total + other.total,
            self.count + other.count,
            max(self.steps, other.steps),
            self.squares + other.squares,
            self.update_squares + other.update_squares,
        )

    def add(self, written: Tensor, exact: Tensor) -> None:
        """Count values as written against exact ones, of the same shape."""
        if written.numel() == 0:
            return
        distance = (written.double() - exact.double()).abs()
        self.maximum = max(self.maximum, float(distance.max()))
        self.total += float(distance.sum())
        self.count += distance.numel()

    def add_fold(self, before: Tensor, written: Tensor, exact: Tensor) -> None:
        """Count constants into which dW was folded."""
        if written.numel() == 0:
            return
        self.add(written, exact)
        distance = (written.double() - exact).abs()
        if written.dtype == torch.float16:
            self.steps = max(self.steps, float((distance / _float16_step(written)).max()))
        self.squares += float(distance.square().sum())
        self.update_squares += float((exact - before.double()).square().sum())


def _float16_step(values: Tensor) -> Tensor:
    """Distance from each float16 value to the next larger one in magnitude, float64."""
    exponent = torch.frexp(values.double()).exponent
    exponent[values == 0] = -13  # as for all subnormals
    return torch.ldexp(torch.ones_like(values, dtype=torch.float64), exponent.clamp_(min=-13) - 11)
