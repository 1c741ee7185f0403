"""The runs of a study: every combination of the axes, with the reference and each variant of each preset.

Runs with equal settings are one run, whichever presets ask for it. They are compared by the adapter of every layer, not
by the text of the schedule. A run's name is a digest of that, so it stays when the study file grows.

With `tune`, the runs of a search come first. The runs that are compared are known once their search has ended, so the
list grows while the study goes on; it is a function of the results on disk.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

from dist_qft.config.fault import KeyPath
from dist_qft.config.load import change_config
from dist_qft.config.schema import RunConfig
from dist_qft.errors import UserError
from dist_qft.study.arms import Arms, placed
from dist_qft.study.figure_names import MERGED, TASK
from dist_qft.study.naming import Skeletons
from dist_qft.study.presets import Variant
from dist_qft.study.settings import Study, axis_labels
from dist_qft.study.study_run import StudyRun
from dist_qft.study.tuning import Search, sign_of


@dataclass(frozen=True)
class Expansion:
    """The runs of a study that are known by now.

    Attributes:
        searches: by (label, variant).
        waiting: runs as they would be, had the searches that they wait for chosen the first value.
    """

    rows: list[StudyRun]
    searches: dict[tuple[str, Variant], Search]
    waiting: list[StudyRun]


def expand(study: Study) -> list[StudyRun]:
    """All runs that are known by now, those of searches first. Reads no weights.

    Each is there once; but where two combinations differ only in the figure that chooses (`tune.metric`) and both
    choose the same value, their run is there for each of them.

    Raises:
        UserError: the first axis or preset that asks for something impossible, with its place in the file.
    """
    return expand_all(study).rows


def expand_all(study: Study) -> Expansion:
    """`expand`, with the searches that decide which runs there are."""
    rows: dict[tuple[str, str], StudyRun] = {}  # by name and label
    owners: dict[tuple[str, str], dict[str, str]] = {}  # by name and the figure that chose: the subject
    tried: dict[str, StudyRun] = {}
    searches: dict[tuple[str, Variant], Search] = {}
    waiting: list[StudyRun] = []
    known_arms: dict[str, Arms] = {}  # by label
    skeletons = Skeletons()
    for subject, config in _subjects(study):
        if config.task.prefers:
            raise UserError(
                f"task.name: got {config.task.name}, must be another in a study, which reports on tokens or labels"
            )
        arms = Arms(study, subject, config, skeletons)
        known_arms[arms.label] = arms
        for row in arms.rows():
            if row.tries is not None:
                known = tried.setdefault(row.name, row)
                tried[row.name] = replace(known, further=known.further and row.further)
                continue
            owner = owners.setdefault((row.name, arms.chosen_by), row.subject)
            if owner != row.subject:
                labels = ", ".join(row.subject.values())
                raise UserError(f"{study.place('axes')}: {labels} has the settings of {', '.join(owner.values())}")
            known = rows.setdefault((row.name, row.label), row)
            if known is not row:
                variants = tuple(dict.fromkeys([*known.variants, *row.variants]))
                rows[row.name, row.label] = replace(known, variants=variants)
        searches |= arms.searches
        waiting += arms.waiting
    _require_figures(study, known_arms)
    # The further values of a search come behind the first ones of all, whose numbers never change.
    return Expansion([*sorted(tried.values(), key=lambda row: row.further), *rows.values()], searches, waiting)


def _require_figures(study: Study, known: Mapping[str, Arms]) -> None:
    """Refuse figures that no run will have, and a search by questions that are compared; `known` is by label."""
    settings = study.settings
    if not any(arms.figures.have(settings.metric) for arms in known.values()):
        label, arms = next(iter(known.items()))
        raise UserError(f"{study.place('metric')}: {arms.figures.refusal(settings.metric, label)}")
    compared = {settings.metric}
    for index, contrast in enumerate(settings.contrasts):
        first, second = contrast.figures(settings.metric)
        for key, label, figure in (("metric", contrast.better, first), ("than_metric", contrast.than, second)):
            if not (figures := known[label].figures).have(figure):
                raise UserError(f"{study.place('contrasts', index, key)}: {figures.refusal(figure, label)}")
        if sign_of(first) != sign_of(second):
            raise UserError(
                f"{study.place('contrasts', index, 'than_metric')}: got '{second}', must be better in the direction "
                f"in which '{first}' is"
            )
        compared |= {first, second}
    for label, arms in known.items() if settings.tune is not None else ():
        if not arms.figures.have(figure := arms.chosen_by):
            raise UserError(f"{study.place('tune', 'metric')}: {arms.figures.refusal(figure, label)}")
        if figure.removeprefix(MERGED).startswith(TASK) and figure in compared:
            raise UserError(
                f"{study.place('tune', 'metric')}: got '{figure}', whose questions are compared, must be a figure of "
                "the search's own held-out data such as loss"
            )


def _subjects(study: Study) -> Iterator[tuple[dict[str, str], RunConfig]]:
    """Each combination of the axes, and its config."""
    axes = study.settings.axes
    for labels in itertools.product(*(axis_labels(values) for values in axes.values())):
        subject, config = dict(zip(axes, labels, strict=True)), study.base
        for axis, label in subject.items():
            values = axes[axis]
            changes = values[label] if isinstance(values, dict) else {axis: values[axis_labels(values).index(label)]}
            place: KeyPath = ("axes", axis, label) if isinstance(values, dict) else ("axes", axis)
            config = placed(study, place, partial(change_config, config, changes))
        yield subject, config
