"""The held-out figures of a study's runs, put so that runs of one seed can be compared.

A run differs from the reference of its own seed by its variant's change alone: same data order, same initial values
of every adapter of equal shape. So effects are differences within a seed, and their spread is that over the seeds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev

from scipy import stats

from dist_qft.config.methods.method import MethodConfig
from dist_qft.config.methods.tile_method import TileMethod
from dist_qft.study.presets import REFERENCE, Variant, value_label
from dist_qft.study.results import Outcome
from dist_qft.study.tuning import sign_of

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its 95 % interval (Student's t); with one seed the interval is unbounded."""

    per_seed: tuple[float, ...]

    @property
    def mean(self) -> float:
        return fmean(self.per_seed)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds; 0 for one seed."""
        return stdev(self.per_seed) if len(self.per_seed) > 1 else 0.0

    @property
    def half_width(self) -> float:
        count = len(self.per_seed)
        if count < 2:
            return math.inf
        return float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * self.spread / math.sqrt(count)

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width


@dataclass
class Subject:
    """One combination of a study's axes: figures by variant and seed.

    Attributes:
        sign: 1 where a smaller figure is better (loss), -1 where a larger one is.
        curves: training losses by variant and seed, one for every `logged_every` steps.
    """

    label: str
    method: MethodConfig
    sign: int
    figures: dict[Variant, dict[int, float]] = field(default_factory=dict)
    curves: dict[Variant, dict[int, list[float]]] = field(default_factory=dict)
    kept: dict[Variant, dict[str, float]] = field(default_factory=dict)
    trainables: dict[Variant, int] = field(default_factory=dict)
    logged_every: dict[Variant, int] = field(default_factory=dict)

    @property
    def tile_method(self) -> TileMethod:
        """The reference's method, which has adapters: no preset is allowed for any other."""
        assert isinstance(self.method, TileMethod)
        return self.method

    @property
    def reference(self) -> dict[int, float]:
        """The reference's figure by seed."""
        return self.figures.get(Variant(REFERENCE), {})

    def variants(self, preset: str) -> list[Variant]:
        """The measured variants of a preset, in the order of the study."""
        return [variant for variant in self.figures if variant.preset == preset]

    def costs(self, variant: Variant) -> dict[int, float]:
        """The loss of a variant against the reference, by seed (positive is worse); over seeds where both are known."""
        figures = self.figures[variant]
        return {seed: self.sign * (figures[seed] - best) for seed, best in self.reference.items() if seed in figures}

    def reference_value(self, preset: str) -> str:
        """The reference's value of the setting that a preset varies."""
        knob, method = preset.partition("_")[0], self.tile_method
        if knob == "balance":
            values = [getattr(method, factor) for factor in method.balancing]
            return value_label(values if len(values) > 1 else values[0])
        return value_label(getattr(method, knob))


def measure(outcomes: Sequence[Outcome], metric: str) -> list[Subject]:
    """The subjects of a study with the figures of their finished runs.

    Subjects without a finished reference are left out, and variants that share no finished seed with theirs.
    """
    subjects: dict[str, Subject] = {}
    for outcome in outcomes:
        row, result = outcome.row, outcome.finished
        if result is None or metric not in result.tuned or row.tries is not None:
            continue
        label, sign = row.label, sign_of(metric)
        for variant in row.variants:
            subject = subjects.setdefault(label, Subject(label, row.config.method, sign))
            if variant.preset == REFERENCE:
                subject.method = row.config.method
            seed = row.config.train.seed
            subject.figures.setdefault(variant, {})[seed] = result.tuned[metric]
            subject.curves.setdefault(variant, {})[seed] = result.history
            subject.kept[variant], subject.trainables[variant] = row.kept, row.trainables
            subject.logged_every[variant] = row.config.train.logging_steps
    for subject in subjects.values():
        for variant in [variant for variant in subject.figures if not subject.costs(variant)]:
            del subject.figures[variant], subject.curves[variant]
    return [subject for subject in subjects.values() if subject.reference]
