"""The runs of one combination of a study's axes: those of its searches, the reference, and its presets' variants."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import fmean
from typing import Any, TypeVar

from dist_qft.config.data_schema import DatasetConfig
from dist_qft.config.fault import KeyPath
from dist_qft.config.load import change_config
from dist_qft.config.methods.tile_method import TileMethod
from dist_qft.config.schema import RunConfig
from dist_qft.errors import UserError
from dist_qft.harness.tasks import TaskRequest
from dist_qft.methods.adapters.adapter_spec import AdapterSpec, linear_shapes
from dist_qft.methods.specs import make_spec
from dist_qft.methods.trainable import TrainableSpec
from dist_qft.study.figure_names import FigureNames
from dist_qft.study.groups import kept_shares
from dist_qft.study.merging import require_mergeable
from dist_qft.study.naming import Skeletons, base_key, run_name
from dist_qft.study.presets import REFERENCE, Variant, preset_variants
from dist_qft.study.result_file import read_result
from dist_qft.study.settings import Study
from dist_qft.study.stages import applies
from dist_qft.study.study_run import StudyRun, label_of
from dist_qft.study.tuning import Search, as_written, first_values, search, start_of
from dist_qft.tuned_model.task import head_parameters

_T = TypeVar("_T")

RUNS_FOLDER = "runs"


class Arms:
    """The reference and all variants of one combination of the axes.

    Attributes:
        label: the name of the combination.
        figures: the names of the figures that its runs will have.
        chosen_by: the figure by which its searches choose.
        searches, waiting: as in `Expansion`, filled while `rows` is walked through.
    """

    def __init__(self, study: Study, subject: dict[str, str], config: RunConfig, skeletons: Skeletons) -> None:
        self._study, self._subject, self._config, self._skeletons = study, subject, config, skeletons
        self._place: KeyPath = ("axes",) if subject else ("base",)
        self._base = placed(study, self._place, lambda: skeletons.get(config))
        self._reference = placed(study, self._place, lambda: make_spec(config, self._base))
        self._layers = linear_shapes(self._base)
        self._merge = next((stage for stage in study.settings.merge if applies(stage.when, subject)), None)
        self.label = label_of(subject, config)
        self.figures = FigureNames.of(config, study.settings.tasks, merged=self._merge is not None)
        tune, metric = study.settings.tune, study.settings.metric
        self.chosen_by = metric if tune is None else tune.metric_of(subject, metric)
        self.searches: dict[tuple[str, Variant], Search] = {}
        self.waiting: list[StudyRun] = []

    def rows(self) -> Iterator[StudyRun]:
        """The runs of the searches, and for every arm whose search has ended a run for each seed."""
        settings = self._study.settings
        for place, variant in self._variants():
            changed, spec = placed(self._study, place, partial(self._varied, variant))
            if self._merge is not None:
                stage, index = self._merge, settings.merge.index(self._merge)
                check = partial(require_mergeable, stage, changed, self._base, spec)
                placed(self._study, ("merge", index), check)
            if settings.tune is not None:
                arm = variant if settings.tune.each == "variant" else Variant(REFERENCE)
                key = (self.label, arm)
                if key not in self.searches:
                    yield from self._search(key, changed)
                best = self.searches[key].best
                if best is None:
                    self.waiting += [self._row(changed, spec, variant, seed) for seed in settings.seeds]
                    continue
                changed, spec = self._made(change_config(changed, {settings.tune.axis: as_written(best)}))
            yield from (self._row(changed, spec, variant, seed) for seed in settings.seeds)

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
            yield from ((place, each) for each in placed(self._study, place, partial(list[Variant], found)))

    def _search(self, key: tuple[str, Variant], config: RunConfig) -> Iterator[StudyRun]:
        """Walk through the search of one arm; yields its runs and keeps its state in `searches`."""
        tune = self._study.settings.tune
        assert tune is not None
        place: KeyPath = ("tune",)
        own = placed(self._study, place, partial(change_config, config, tune.set))
        if obstacle := _not_apart(own, config):
            raise UserError(f"{self._study.place('tune', 'set')}: {obstacle}")
        start = placed(self._study, place, partial(start_of, own, tune.axis))
        first = first_values(tune, start)
        found: dict[float, list[StudyRun]] = {}

        def with_value(value: float) -> tuple[RunConfig, TrainableSpec[Any]]:
            return self._made(change_config(own, {tune.axis: as_written(value)}))

        def measured(value: float) -> float | None:
            tried, spec = placed(self._study, place, partial(with_value, value))
            further = value not in first
            found[value] = [self._row(tried, spec, key[1], seed, value, further) for seed in tune.seeds]
            results = [read_result(row.folder) for row in found[value]]
            if any(result is None for result in results):
                return None
            return fmean(result.tuned.get(self.chosen_by, math.inf) for result in results if result is not None)

        def allowed(value: float) -> bool:
            try:
                with_value(value)
            except UserError:
                return False
            return True

        self.searches[key] = search(tune, start, self.chosen_by, measured, allowed)
        for rows in found.values():
            yield from rows

    def _varied(self, variant: Variant) -> tuple[RunConfig, TrainableSpec[Any]]:
        return self._made(with_rules(self._config, variant.rules) if variant.rules else self._config)

    def _made(self, config: RunConfig) -> tuple[RunConfig, TrainableSpec[Any]]:
        """A config, and the trainables that it gives."""
        return config, make_spec(config, self._skeletons.get(config))

    def _row(
        self,
        config: RunConfig,
        spec: TrainableSpec[Any],
        variant: Variant,
        seed: int,
        tries: float | None = None,
        further: bool = False,
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
        return StudyRun(
            name,
            final,
            self._subject,
            (variant,),
            trainables,
            kept,
            base_key(final, spec),
            self._merge,
            tries,
            further,
            TaskRequest(tuple(settings.tasks), settings.tasks_path) if settings.tasks else None,
            tuple(settings.keep) if tries is None else (),
        )


def _not_apart(own: RunConfig, compared: RunConfig) -> str | None:
    """The reason why a search would choose on rows that are compared afterwards; None if it has rows of its own."""
    if own.data is None or compared.data is None:
        return None
    need = "must give the search held-out data of its own (data.eval...)"
    chosen, others = own.data.eval_sets(), compared.data.eval_sets()
    shared = [d for d in chosen.values() if any(_place(d) == _place(other) for other in others.values())]
    if shared:
        return f"{need}: runs are compared on '{shared[0].path}'"
    trained = [set(map(_place, config.data.train_sets().values())) for config in (own, compared) if config.data]
    # Of one data set, the samples that a smaller number holds out are among those of a larger one.
    nested = own.data.eval_samples and compared.data.eval_samples and not (chosen or others)
    if nested and set.intersection(*trained):
        return f"{need}: eval_samples are a part of the samples that are compared, or contain them"
    return None


def _place(dataset: DatasetConfig) -> tuple[str, str | None, str]:
    """Equal for data sets that share rows, whatever number of them each uses."""
    return dataset.path, dataset.name, dataset.split


def with_rules(config: RunConfig, rules: Sequence[dict[str, Any]]) -> RunConfig:
    """The config with rules added behind those of its `method.schedule`."""
    assert isinstance(config.method, TileMethod)
    own = [rule.model_dump(exclude_unset=True) for rule in config.method.schedule]
    return change_config(config, {"method.schedule": [*own, *rules]})


def placed(study: Study, path: KeyPath, work: Callable[[], _T]) -> _T:
    """The result of `work`, whose UserError gets the place in the study file; its first line says enough."""
    try:
        return work()
    except UserError as error:
        raise UserError(f"{study.place(*path)}: {str(error).splitlines()[0]}") from None
