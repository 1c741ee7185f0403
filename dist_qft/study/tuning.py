"""The search for the best value of one number, such as the learning rate, before runs are compared.

The values lie a factor apart around the one that the config has. Where the best is the first or the last of them, the
search goes on beyond it, so that no comparison rests on the edge of what was tried. A search is a function of the
results on disk: started again, it goes on where it stopped.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dist_qft.config.fault import dotted
from dist_qft.config.override import key_path
from dist_qft.config.schema import RunConfig
from dist_qft.errors import UserError
from dist_qft.study.stages import TuneSettings

_SMALLER_IS_BETTER = ("bits_per_byte", "brier_score", "ter")  # of lm-evaluation-harness, beside perplexities


@dataclass(frozen=True)
class Search:
    """A search so far.

    Attributes:
        figures: value -> figure of its runs, mean over their seeds, in the order of trial; None if they are not done.
            A run that failed counts as infinitely bad.
        metric: what the figures are, such as "loss".
        best: the best value; None while runs are missing.
        on_edge: the best is the smallest or largest value that was tried, and there may be no further one.
    """

    figures: Mapping[float, float | None]
    metric: str
    best: float | None
    on_edge: bool

    @property
    def sign(self) -> int:
        """1 where a smaller figure is better, -1 where a larger one is."""
        return sign_of(self.metric)

    def curve(self) -> list[tuple[float, float]]:
        """(value, figure) of the runs that are done and did not fail, by value."""
        return sorted((v, f) for v, f in self.figures.items() if f is not None and math.isfinite(f))


def sign_of(metric: str) -> int:
    """1 where smaller figures are better: losses, and some of lm-evaluation-harness; -1 for all other figures."""
    name = metric.rpartition("/")[2].partition(",")[0]  # behind the comma the harness names a filter of answers
    return 1 if name.endswith(("loss", "perplexity")) or name in _SMALLER_IS_BETTER else -1


def search(
    settings: TuneSettings,
    start: float,
    metric: str,
    measured: Callable[[float], float | None],
    allowed: Callable[[float], bool] = lambda value: True,
) -> Search:
    """Walk through the values as far as their figures are known.

    Args:
        start: the config's value, the middle of the first values.
        measured: figure of a value; None if its runs are not done, NaN or infinite if they failed.
        allowed: False for a value that no config may have; the search does not go on to it.
    """
    sign = sign_of(metric)
    figures = {value: measured(value) for value in first_values(settings, start)}
    further = 0
    while all(figure is not None for figure in figures.values()):
        best = min(figures, key=lambda value: _badness(figures[value], sign))
        if not math.isfinite(_badness(figures[best], sign)):
            return Search(figures, metric, None, False)  # every value failed
        beyond = _beyond(sorted(figures), best, settings.factor)
        if beyond is None:
            return Search(figures, metric, best, False)
        if further == settings.widen or not allowed(beyond):
            return Search(figures, metric, best, True)
        further += 1
        figures[beyond] = measured(beyond)
    return Search(figures, metric, None, False)


def first_values(settings: TuneSettings, start: float) -> list[float]:
    """The values that every search tries, ascending."""
    if settings.values is not None:
        return sorted(set(settings.values))
    first = -(settings.tries - 1) / 2 if settings.tries % 2 else -(settings.tries // 2 - 1)
    return [rounded(start * settings.factor ** (first + index)) for index in range(settings.tries)]


def rounded(value: float) -> float:
    """Six digits: a value that is written down and read again stays the same."""
    return float(f"{value:.6g}")


def as_written(value: float) -> float | int:
    """The value as a config has it: a whole number is one, as ranks must be."""
    return int(value) if value.is_integer() else value


def start_of(config: RunConfig, axis: str) -> float:
    """The number that a config has for `axis`.

    Raises:
        UserError: it has none that is above 0.
    """
    value: object = config
    for part in key_path(axis):
        try:
            value = value[int(part)] if isinstance(value, list) else getattr(value, str(part))
        except (AttributeError, IndexError, TypeError, ValueError):
            raise UserError(f"axis: unknown key '{dotted(key_path(axis))}'") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise UserError(f"axis: {axis} is {value!r}, must be a number > 0")
    return float(value)


def _badness(figure: float | None, sign: int) -> float:
    if figure is None or not math.isfinite(figure):
        return math.inf
    return sign * figure


def _beyond(values: Sequence[float], best: float, factor: float) -> float | None:
    """The next value beyond the best if that is at an edge; None if it lies between others."""
    if best == values[-1]:
        return rounded(best * factor)
    return rounded(best / factor) if best == values[0] else None
