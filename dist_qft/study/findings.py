"""The findings of a study on the paper's claims: an effect size with its spread over the seeds, and a verdict.

The claims are those of the abstract of Shen et al. (CMC 82(1), 2025); their own tables were not readable to us, so the
contrasts that test them are our choice and stand beside each finding. A claim *holds in this data* if the whole 95 %
interval of its contrast is on its side, *does not hold* if all of it is on the other, else it *cannot be told*. Nothing
is said beyond the model, data and lengths of the runs, and no correction is made for asking several questions.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean

from dist_qft.config.methods.tile_method import BlockMethod
from dist_qft.study.groups import THIRDS, TYPES
from dist_qft.study.measurements import Estimate, Subject
from dist_qft.study.presets import Variant

HOLDS, FAILS, OPEN = "holds in this data", "does not hold in this data", "cannot be told"


@dataclass(frozen=True)
class Finding:
    """One claim on one subject.

    Attributes:
        contrast: the figure that is computed for each seed; positive speaks for the claim.
        unit: of the estimate.
    """

    claim: str
    statement: str
    subject: str
    contrast: str
    unit: str
    estimate: Estimate

    @property
    def verdict(self) -> str:
        if self.estimate.low > 0:
            return HOLDS
        return FAILS if self.estimate.high < 0 else OPEN

    @property
    def effect(self) -> str:
        """The effect in words, with its interval and spread."""
        estimate, count = self.estimate, len(self.estimate.per_seed)
        interval = "one seed gives no interval"
        if count > 1:
            interval = (
                f"95 % interval {number(estimate.low)} to {number(estimate.high)}, "
                f"standard deviation {estimate.spread:.3g} over {count} seeds"
            )
        return f"{self.subject}: {self.contrast} is {number(estimate.mean)} {self.unit} ({interval})"

    @property
    def sentence(self) -> str:
        """The finding in words, with its verdict."""
        return f"{self.effect}: claim {self.claim} {self.verdict}."


def number(value: float) -> str:
    """A signed effect with three digits that count."""
    return f"{value:+.3g}"


def find(subjects: Sequence[Subject], unit: str) -> list[Finding]:
    """Every claim on every subject that has the runs for it."""
    tests = (_rank_by_type, _balance_by_type, _balance_by_depth, _block_by_type, _type_over_depth)
    found = [finding for test in tests for subject in subjects if (finding := test(subject, unit))]
    return [*found, *(finding for subject in subjects for finding in _equal_discounts(subject, unit))]


def _rank_by_type(subject: Subject, unit: str) -> Finding | None:
    if isinstance(subject.method, BlockMethod):
        return None
    statement = "MLP layers keep performance when the adapter's rank is cut; attention layers are more sensitive"
    return _type_contrast(subject, "rank_by_type", "1", statement, unit)


def _block_by_type(subject: Subject, unit: str) -> Finding | None:
    if not isinstance(subject.method, BlockMethod):
        return None
    preset = "rank_by_type" if subject.method.ranked else "balance_by_type"
    statement = "in quantization-aware fine-tuning, MLP layers do well with smaller adapters, attention layers do not"
    return _type_contrast(subject, preset, "3", statement, unit)


def _type_contrast(subject: Subject, preset: str, claim: str, statement: str, unit: str) -> Finding | None:
    """The cost of the same cut in attention minus that in MLP, as a mean over the values that cut both."""
    cuts = {v: subject.costs(v) for v in subject.variants(preset) if subject.kept[v].get("total", 1.0) < 1.0}
    values = [v.value for v in cuts if v.group == TYPES[0] and Variant(preset, TYPES[1], v.value) in cuts]
    if not values:
        return None
    costs = [[cuts[Variant(preset, group, value)] for value in values] for group in TYPES]
    estimate = _by_seed(lambda seed: fmean(c[seed] for c in costs[0]) - fmean(c[seed] for c in costs[1]), *costs)
    what = "tile" if preset.startswith("balance") else "rank"
    contrast = f"the cost of a smaller adapter ({what} {', '.join(values)}) in attention minus that in MLP"
    if estimate is None:
        return None
    return Finding(claim, statement, subject.label, contrast, unit, estimate)


def _balance_by_type(subject: Subject, unit: str) -> Finding | None:
    return _value_over_group(subject, "balance_by_type", "2 (type)", "layer type", TYPES, unit)


def _balance_by_depth(subject: Subject, unit: str) -> Finding | None:
    return _value_over_group(subject, "balance_by_depth", "2 (depth)", "depth", THIRDS, unit)


def _value_over_group(
    subject: Subject, preset: str, claim: str, what: str, names: Sequence[str], unit: str
) -> Finding | None:
    """Mean square between values minus mean square between groups: 0 is expected where neither matters."""
    known = {(v.group, v.value): subject.costs(v) for v in subject.variants(preset)}
    groups = [name for name in names if any(group == name for group, _ in known)]
    values = [v for v in dict.fromkeys(value for _, value in known) if all((g, v) in known for g in groups)]
    if len(groups) < 2 or len(values) < 2:
        return None

    def contrast(seed: int) -> float:
        table = [[known[group, value][seed] for value in values] for group in groups]
        return _mean_square(list(zip(*table, strict=True))) - _mean_square(table)

    estimate = _by_seed(contrast, [known[key] for key in product(groups, values)])
    statement = f"the effect of the balancing factor depends more on its value than on {what}"
    text = f"the mean square between balancing factors {', '.join(values)} minus that between {', '.join(groups)}"
    if estimate is None:
        return None
    return Finding(claim, statement, subject.label, text, f"({unit})^2", estimate)


def _type_over_depth(subject: Subject, unit: str) -> Finding | None:
    """Mean square between the types minus mean square between the thirds of the depth, for the same rank cuts."""
    tables = {}
    for preset, names in (("rank_by_type", TYPES), ("rank_by_depth", THIRDS)):
        cuts = {
            (v.group, v.value): subject.costs(v)
            for v in subject.variants(preset)
            if subject.kept[v].get("total", 1.0) < 1.0
        }
        tables[preset] = names, cuts
    values = [
        value
        for value in dict.fromkeys(value for _, cuts in tables.values() for _, value in cuts)
        if all((name, value) in cuts for names, cuts in tables.values() for name in names)
    ]
    if not values:
        return None

    def contrast(seed: int) -> float:
        squares = [
            _mean_square([[cuts[name, value][seed] for value in values] for name in names])
            for names, cuts in tables.values()
        ]
        return squares[0] - squares[1]

    used = [cuts[name, value] for names, cuts in tables.values() for name, value in product(names, values)]
    estimate = _by_seed(contrast, used)
    statement = "layer type matters more than depth"
    text = f"the mean square between layer types minus that between thirds of the depth (rank {', '.join(values)})"
    return (
        None
        if estimate is None
        else Finding("4 (type over depth)", statement, subject.label, text, f"({unit})^2", estimate)
    )


def _equal_discounts(subject: Subject, unit: str) -> Iterator[Finding]:
    """The cost of taking the same number of trainables from attention minus that from MLP, for each discount."""
    known = {(v.group, v.value): v for v in subject.variants("equal_discount")}
    statement = "for the same discount, a cut in MLP layers preserves more than one in attention layers"
    for value in dict.fromkeys(value for _, value in known):
        if not all((name, value) in known for name in TYPES):
            continue
        attention, mlp = (subject.costs(known[name, value]) for name in TYPES)
        seeds = sorted(attention.keys() & mlp.keys())
        if seeds:
            share, hold = value.split(" ")
            contrast = f"the cost of a discount of {share} ({hold}) in attention minus that in MLP"
            estimate = Estimate(tuple(attention[seed] - mlp[seed] for seed in seeds))
            yield Finding("5 (equal discount)", statement, subject.label, contrast, unit, estimate)


def _mean_square(table: Sequence[Sequence[float]]) -> float:
    """Mean square between the rows of a table, as in an analysis of variance: its noise does not grow with them."""
    means = [fmean(row) for row in table]
    center = fmean(means)
    return len(table[0]) * sum((mean - center) ** 2 for mean in means) / (len(table) - 1)


def _by_seed(contrast: Callable[[int], float], *used: Sequence[dict[int, float]]) -> Estimate | None:
    """The contrast over the seeds that all the costs it uses have; None without such a seed."""
    seeds = sorted(set.intersection(*(set(costs) for some in used for costs in some)))
    return Estimate(tuple(contrast(seed) for seed in seeds)) if seeds else None
