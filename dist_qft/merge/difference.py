"""Distance between written weights and the exact ones, collected over layers and ranks. NaN stays NaN throughout."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Difference:
    """Distance between weights as written and as they should be.

    Attributes:
        maximum, total, count: largest distance, sum of all distances, number of weights.
        steps: largest distance of a folded zero, in units of the float16 step at the value written.
        squares, update_squares: sums of squares of the distances and of dW itself, over weights that have a dW.
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
        """Root mean square of the distances over that of dW: the share of the update lost to rounding."""
        return math.sqrt(self.squares / self.update_squares) if self.update_squares else 0.0

    @property
    def finite(self) -> bool:
        """True if no weight that was counted was NaN or infinite."""
        return all(map(math.isfinite, (self.maximum, self.total, self.steps, self.squares, self.update_squares)))

    def __add__(self, other: "Difference") -> "Difference":
        return Difference(
            larger(self.maximum, other.maximum),
            self.total + other.total,
            self.count + other.count,
            larger(self.steps, other.steps),
            self.squares + other.squares,
            self.update_squares + other.update_squares,
        )

    def add(self, written: Tensor, exact: Tensor, before: Tensor | None = None) -> None:
        """Count values as written against exact ones of the same shape.

        Args:
            before: the values without dW, for weights that have one.
        """
        if written.numel() == 0:
            return
        distance = (written.double() - exact.double()).abs()
        self.maximum = larger(self.maximum, float(distance.max()))
        self.total += float(distance.sum())
        self.count += distance.numel()
        if before is not None:
            self.squares += float(distance.square().sum())
            self.update_squares += float((exact.double() - before.double()).square().sum())

    def add_fold(self, before: Tensor, written: Tensor, exact: Tensor) -> None:
        """Count constants into which dW was folded."""
        if written.numel() == 0:
            return
        self.add(written, exact, before)
        if written.dtype == torch.float16:
            distance = (written.double() - exact).abs()
            self.steps = larger(self.steps, float((distance / _float16_step(written)).max()))


def larger(first: float, second: float) -> float:
    """The larger of two numbers, NaN if either is. (Python's max(0.0, nan) is 0.0.)"""
    return math.nan if math.isnan(first) or math.isnan(second) else max(first, second)


def _float16_step(values: Tensor) -> Tensor:
    """Distance from each float16 value to the next larger one in magnitude, float64."""
    exponent = torch.frexp(values.double()).exponent
    exponent[values == 0] = -13  # as for all subnormals
    return torch.ldexp(torch.ones_like(values, dtype=torch.float64), exponent.clamp_(min=-13) - 11)
