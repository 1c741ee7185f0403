"""`--suggest`: from a finished study and a budget of trainables, a config for the next run.

Costs of single changes are added up: the cost of a rank or balancing factor in attention plus that of another in MLP
(or over the parts of the depth, where only those were varied). The study has not measured the combination, so the
config states the prediction, for the next run to test. A choice is made among measured values only.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from dist_qft.base_model.skeleton import build_skeleton
from dist_qft.config.load import change_config, keep_config
from dist_qft.config.schema import RunConfig
from dist_qft.errors import UserError
from dist_qft.methods.specs import make_spec
from dist_qft.ranks.device import compute_dtype, planned_device
from dist_qft.study.arms import with_rules
from dist_qft.study.measurements import Estimate, Subject, measure
from dist_qft.study.presets import REFERENCE, Variant
from dist_qft.study.results import collect
from dist_qft.study.settings import Study
from dist_qft.study.study_run import StudyRun

_KINDS = ("by_type", "by_depth")


@dataclass(frozen=True)
class _Change:
    """One group's new value of one setting, and its cost by seed."""

    variant: Variant
    costs: dict[int, float]


def write_suggestions(study: Study, rows: Sequence[StudyRun], budget: int) -> None:
    """Write `suggested-<subject>.yaml` for every subject, and print the choices.

    Raises:
        UserError: runs are missing, the study varies no rank or balancing factor, or nothing fits the budget.
    """
    outcomes = collect(rows)
    missing = [outcome for outcome in outcomes if not outcome.done and not outcome.ended_search]
    if missing:
        raise UserError(f"--suggest: {len(missing)} of {len(rows)} runs are not done; finish the study first")
    written = []
    for subject in measure(outcomes, study.settings.metric):
        own = [row for row in rows if row.label == subject.label and row.tries is None]
        reference = next(row for row in own if any(v.preset == REFERENCE for v in row.variants))
        changes, parameters, config = _best(subject, reference.config, budget)
        name = "-".join(subject.label.replace(",", "").split())
        target = study.output_dir / f"suggested-{name}.yaml"
        config = change_config(config, {"output_dir": str(study.output_dir / f"suggested-{name}")})
        keep_config(config, target)
        written.append(f"{target}: {_describe(changes, subject)}, {parameters:,} trainables")
    print(*written, sep="\n")


def _best(subject: Subject, config: RunConfig, budget: int) -> tuple[list[_Change], int, RunConfig]:
    """The combination with the lowest predicted cost within the budget; of equals the smaller."""
    base = build_skeleton(
        config.model, config.quantization, compute_dtype(config.train.precision, planned_device(config.sharding.device))
    )
    found: list[tuple[float, int, int, list[_Change], RunConfig]] = []
    smallest: int | None = None
    for changes in _combinations(subject):
        tried = with_rules(config, [rule for change in changes for rule in change.variant.rules])
        parameters = make_spec(tried, base).parameters
        smallest = min(parameters, smallest or parameters)
        if parameters <= budget:
            cost = sum(fmean(change.costs.values()) for change in changes)
            found.append((cost, parameters, len(found), list(changes), tried))
    if smallest is None:
        raise UserError(f"--suggest: the study varies no rank or balancing factor for {subject.label}")
    if not found:
        raise UserError(f"--suggest: got {budget:,}, the smallest combination of {subject.label} has {smallest:,}")
    _, parameters, _, best, config = min(found, key=lambda each: each[:3])
    return best, parameters, config


def _combinations(subject: Subject) -> Iterator[tuple[_Change, ...]]:
    """Combinations for types, then for depths: each group has the reference's or a measured value of each setting."""
    for kind in _KINDS:
        presets = [name for name in (f"rank_{kind}", f"balance_{kind}") if subject.variants(name)]
        options: list[list[_Change | None]] = []
        for preset in presets:
            own = subject.variants(preset)
            for group in dict.fromkeys(variant.group for variant in own):
                changes = [_Change(v, subject.costs(v)) for v in own if v.group == group]
                options.append([None, *changes])
        if options:
            for chosen in itertools.product(*options):
                yield tuple(change for change in chosen if change is not None)


def _describe(changes: Sequence[_Change], subject: Subject) -> str:
    if not changes:
        return "the reference itself"
    seeds = sorted(set.intersection(*(set(change.costs) for change in changes)))
    total = Estimate(tuple(sum(change.costs[seed] for change in changes) for seed in seeds))
    what = ", ".join(f"{c.variant.preset.partition('_')[0]} {c.variant.value} in {c.variant.group}" for c in changes)
    return (
        f"{what}: predicted change for the worse {total.mean:+.3g} against the reference "
        f"(standard deviation {total.spread:.2g} over {len(seeds)} seeds, effects added up)"
    )
