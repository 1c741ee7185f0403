"""The runs of a study: every combination of the axes, with the reference and each variant of each preset.

Runs with equal settings are one run, whichever presets ask for it. They are compared by the adapter of every layer, not
by the text of the schedule. A run's name is a digest of that, so it stays when the study file grows.

With `tune`, the runs of a search come first. The runs that are compared are known once their search has ended, so the
list grows while the study goes on; it is a function of the results on disk.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from dist_qft.base_model.skeleton import BaseModel
from dist_qft.config.fault import KeyPath
from dist_qft.config.load import change_config
from dist_qft.config.methods.tile_method import TileMethod
from dist_qft.config.schema import RunConfig
from dist_qft.errors import UserError
from dist_qft.harness.command import TaskRequest
from dist_qft.methods.adapters.adapter_spec import AdapterSpec, linear_shapes
from dist_qft.methods.specs import make_spec
from dist_qft.methods.trainable import TrainableSpec
from dist_qft.study.groups import kept_shares
from dist_qft.study.merging import require_mergeable
from dist_qft.study.naming import Skeletons, base_key, run_name
from dist_qft.study.presets import REFERENCE, Variant, preset_variants
from dist_qft.study.result_file import read_result
from dist_qft.study.settings import Study, axis_labels
from dist_qft.study.stages import MergeStage, applies
from dist_qft.study.tuning import Search, search, start_of
from dist_qft.tuned_model.task import head_parameters

_T = TypeVar("_T")

RUNS_FOLDER = "runs"


@dataclass(frozen=True)
class StudyRun:
    """One run of a study.

    Attributes:
        subject: axis -> label.
        variants: those that the run stands for; several if presets meet in it.
        trainables: number of trainable values, by the method's formula.
        kept: group -> parameters after / parameters of the reference; empty where the method has no adapters.
        base_key: equal for runs that may use one loaded base.
        merge: the merge whose result is measured, if there is one.
        tries: the value that this run of a search tries; None for a run that is compared.
        tasks: of lm-evaluation-harness, on which the run's model and its merged file are measured.
        keep: what stays of the run beside its figures.
    """

    name: str
    config: RunConfig
    subject: dict[str, str]
    variants: tuple[Variant, ...]
    trainables: int
    kept: dict[str, float] = field(hash=False)
    base_key: str = ""
    merge: MergeStage | None = None
    tries: float | None = None
    tasks: TaskRequest | None = None
    keep: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """The folder in which the run keeps its files."""
        return Path(self.config.output_dir)

    @property
    def label(self) -> str:
        """The name of the combination of the axes."""
        return ", ".join(self.subject.values()) or self.config.method.name

    def __str__(self) -> str:
        subject = [f"{axis} {label}" for axis, label in self.subject.items()]
        tried = [] if self.tries is None else [f"tries {self.tries:g}"]
        return ", ".join([*subject, " = ".join(map(str, self.variants)), *tried, f"seed {self.config.train.seed}"])


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
    skeletons = Skeletons()
    for subject, config in _subjects(study):
        if config.task.prefers:
            raise UserError(
                f"task.name: got {config.task.name}, must be another in a study, which reports on tokens or labels"
            )
        arms = _Arms(study, subject, config, skeletons)
        for row in arms.rows():
            if row.tries is not None:
                tried.setdefault(row.name, row)
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
    return Expansion([*tried.values(), *rows.values()], searches, waiting)


def _subjects(study: Study) -> Iterator[tuple[dict[str, str], RunConfig]]:
    """Each combination of the axes, and its config."""
    axes = study.settings.axes
    for labels in itertools.product(*(axis_labels(values) for values in axes.values())):
        subject, config = dict(zip(axes, labels, strict=True)), study.base
        for axis, label in subject.items():
            values = axes[axis]
            changes = values[label] if isinstance(values, dict) else {axis: values[axis_labels(values).index(label)]}
            place: KeyPath = ("axes", axis, label) if isinstance(values, dict) else ("axes", axis)
            config = _placed(study, place, partial(change_config, config, changes))
        yield subject, config


class _Arms:
    """The reference and all variants of one combination of the axes.

    Attributes:
        chosen_by: the figure by which its searches choose.
        searches, waiting: as in `Expansion`, filled while `rows` is walked through.
    """

    def __init__(self, study: Study, subject: dict[str, str], config: RunConfig, skeletons: Skeletons) -> None:
        self._study, self._subject, self._config = study, subject, config
        self._place: KeyPath = ("axes",) if subject else ("base",)
        self._base = _placed(study, self._place, lambda: skeletons.get(config))
        self._reference = _placed(study, self._place, lambda: make_spec(config, self._base))
        self._layers = linear_shapes(self._base)
        self._merge = next((stage for stage in study.settings.merge if applies(stage.when, subject)), None)
        tune, metric = study.settings.tune, study.settings.metric
        self.chosen_by = metric if tune is None else tune.metric_of(subject, metric)
        self.searches: dict[tuple[str, Variant], Search] = {}
        self.waiting: list[StudyRun] = []

    def rows(self) -> Iterator[StudyRun]:
        """The runs of the searches, and for every arm whose search has ended a run for each seed."""
        settings = self._study.settings
        for place, variant in self._variants():
            changed, spec = _placed(self._study, place, partial(_with_variant, self._config, variant, self._base))
            if self._merge is not None:
                stage, index = self._merge, settings.merge.index(self._merge)
                check = partial(require_mergeable, stage, changed, self._base, spec)
                _placed(self._study, ("merge", index), check)
            if settings.tune is not None:
                arm = variant if settings.tune.each == "variant" else Variant(REFERENCE)
                key = (self._label, arm)
                if key not in self.searches:
                    yield from self._search(key, changed, spec)
                best = self.searches[key].best
                if best is None:
                    self.waiting += [self._row(changed, spec, variant, seed) for seed in settings.seeds]
                    continue
                changed = change_config(changed, {settings.tune.axis: best})
            yield from (self._row(changed, spec, variant, seed) for seed in settings.seeds)

    @property
    def _label(self) -> str:
        return ", ".join(self._subject.values()) or self._config.method.name

    def _variants(self) -> Iterator[tuple[KeyPath, Variant]]:
        """The reference and the variants of all presets that apply, each with its place in the file."""
        yield self._place, Variant(REFERENCE)
        for index, preset in enumerate(self._study.settings.presets):
            if not applies(preset.when, self._subject):
                continue
            place: KeyPath = ("presets", index)
            if not (isinstance(self._reference, AdapterSpec) and isinstance(self._config.method, TileMethod)):
                name = self._config.method.name
                raise UserError(f"{self._study.place(*place)}: {preset.preset} varies adapters, {name} has none")
            found = preset_variants(preset, self._config.method, self._reference.tiles, self._layers)
            yield from ((place, each) for each in _placed(self._study, place, partial(list[Variant], found)))

    def _search(self, key: tuple[str, Variant], config: RunConfig, spec: TrainableSpec[Any]) -> Iterator[StudyRun]:
        """Walk through the search of one arm; yields its runs and keeps its state in `searches`."""
        tune = self._study.settings.tune
        assert tune is not None
        place: KeyPath = ("tune",)
        own = _placed(self._study, place, partial(change_config, config, tune.set))
        if own.data is not None and config.data is not None and _held_out(own) == _held_out(config):
            raise UserError(
                f"{self._study.place('tune', 'set')}: must give the search held-out data of its own (data.eval...)"
            )
        start = _placed(self._study, place, partial(start_of, own, tune.axis))
        found: dict[float, list[StudyRun]] = {}

        def measured(value: float) -> float | None:
            tried = _placed(self._study, place, partial(change_config, own, {tune.axis: value}))
            found[value] = [self._row(tried, spec, key[1], seed, tries=value) for seed in tune.seeds]
            results = [read_result(row.folder) for row in found[value]]
            if any(result is None for result in results):
                return None
            return fmean(result.tuned.get(self.chosen_by, math.inf) for result in results if result is not None)

        self.searches[key] = search(tune, start, self.chosen_by, measured)
        for rows in found.values():
            yield from rows

    def _row(
        self, config: RunConfig, spec: TrainableSpec[Any], variant: Variant, seed: int, tries: float | None = None
    ) -> StudyRun:
        """One run of an arm whose settings are `config`."""
        settings = self._study.settings
        kept: dict[str, float] = {}
        if isinstance(self._reference, AdapterSpec) and isinstance(spec, AdapterSpec):
            kept = kept_shares(self._reference.tiles, spec.tiles, self._layers)
        trainables = spec.parameters + head_parameters(config.task, self._base)
        seeded = change_config(config, {"train.seed": seed})
        name = run_name(seeded, spec, self._merge, settings.tasks)
        changes = {"output_dir": str(self._study.output_dir / RUNS_FOLDER / name)}
        if seeded.data is not None and seeded.data.cache_dir is None:
            changes["data.cache_dir"] = str(self._study.output_dir / "data_cache")
        final = change_config(seeded, changes)
        key = base_key(final, spec)
        keep = tuple(settings.keep) if tries is None else ()
        tasks = TaskRequest(tuple(settings.tasks), settings.tasks_path) if settings.tasks else None
        return StudyRun(name, final, self._subject, (variant,), trainables, kept, key, self._merge, tries, tasks, keep)


def _held_out(config: RunConfig) -> object:
    assert config.data is not None
    return config.data.eval, config.data.eval_samples


def _with_variant(config: RunConfig, variant: Variant, base: BaseModel) -> tuple[RunConfig, TrainableSpec[Any]]:
    if variant.rules:
        config = with_rules(config, variant.rules)
    return config, make_spec(config, base)


def with_rules(config: RunConfig, rules: Sequence[dict[str, Any]]) -> RunConfig:
    """The config with rules added behind those of its `method.schedule`."""
    assert isinstance(config.method, TileMethod)
    own = [rule.model_dump(exclude_unset=True) for rule in config.method.schedule]
    return change_config(config, {"method.schedule": [*own, *rules]})


def _placed(study: Study, path: KeyPath, work: Callable[[], _T]) -> _T:
    """The result of `work`, whose UserError gets the place in the study file; its first line says enough."""
    try:
        return work()
    except UserError as error:
        raise UserError(f"{study.place(*path)}: {str(error).splitlines()[0]}") from None
