"""The runs of a study: every combination of the axes, with the reference and each variant of each preset.

Runs with equal settings are one run, whichever presets ask for it. They are compared by the adapter of every layer, not
by the text of the schedule. A run's name is a digest of that, so it stays when the study file grows.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from dist_qft.base_model.skeleton import BaseModel, build_skeleton
from dist_qft.config.fault import KeyPath
from dist_qft.config.load import change_config
from dist_qft.config.methods.tile_method import TileMethod
from dist_qft.config.renamed import with_earlier_names
from dist_qft.config.schema import RunConfig
from dist_qft.errors import UserError
from dist_qft.methods.adapters.adapter_spec import AdapterSpec, linear_shapes
from dist_qft.methods.specs import make_spec
from dist_qft.methods.trainable import TrainableSpec
from dist_qft.ranks.device import compute_dtype, planned_device
from dist_qft.study.groups import kept_shares
from dist_qft.study.presets import REFERENCE, Variant, preset_variants
from dist_qft.study.settings import Study, axis_labels
from dist_qft.tuned_model.task import head_outputs

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
    """

    name: str
    config: RunConfig
    subject: dict[str, str]
    variants: tuple[Variant, ...]
    trainables: int
    kept: dict[str, float] = field(hash=False)
    base_key: str = ""

    @property
    def folder(self) -> Path:
        """The folder in which the run keeps its files."""
        return Path(self.config.output_dir)

    def __str__(self) -> str:
        subject = [f"{axis} {label}" for axis, label in self.subject.items()]
        return ", ".join([*subject, " = ".join(map(str, self.variants)), f"seed {self.config.train.seed}"])


def expand(study: Study) -> list[StudyRun]:
    """All runs, each once, in the order of the file. Reads no weights.

    Raises:
        UserError: the first axis or preset that asks for something impossible, with its place in the file.
    """
    rows: dict[str, StudyRun] = {}
    skeletons = _Skeletons()
    for subject, config in _subjects(study):
        for row in _subject_rows(study, subject, config, skeletons):
            known = rows.get(row.name)
            if known is None:
                rows[row.name] = row
            elif known.subject == row.subject:
                rows[row.name] = replace(known, variants=tuple(dict.fromkeys([*known.variants, *row.variants])))
            else:
                labels = ", ".join(row.subject.values())
                raise UserError(
                    f"{study.place('axes')}: {labels} has the settings of {', '.join(known.subject.values())}"
                )
    return list(rows.values())


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


def _subject_rows(
    study: Study, subject: dict[str, str], config: RunConfig, skeletons: "_Skeletons"
) -> Iterator[StudyRun]:
    """The reference and all variants of one combination of the axes, for every seed."""
    place: KeyPath = ("axes",) if subject else ("base",)
    base = _placed(study, place, lambda: skeletons.get(config))
    reference = _placed(study, place, lambda: make_spec(config, base))
    layers = linear_shapes(base)
    chosen: list[tuple[KeyPath, Variant]] = [(place, Variant(REFERENCE))]
    for index, preset in enumerate(study.settings.presets):
        if any(subject[axis] != label for axis, label in preset.when.items()):
            continue
        place = ("presets", index)
        if not (isinstance(reference, AdapterSpec) and isinstance(config.method, TileMethod)):
            raise UserError(f"{study.place(*place)}: {preset.preset} varies adapters, {config.method.name} has none")
        variants = preset_variants(preset, config.method, reference.tiles, layers)
        chosen += [(place, variant) for variant in _placed(study, place, partial(list[Variant], variants))]
    for place, variant in chosen:
        changed, spec = _placed(study, place, partial(_with_variant, config, variant, base))
        kept: dict[str, float] = {}
        if isinstance(reference, AdapterSpec) and isinstance(spec, AdapterSpec):
            kept = kept_shares(reference.tiles, spec.tiles, layers)
        trainables = spec.parameters + head_outputs(config.task) * base.embedding.embedding_dim
        for seed in study.settings.seeds:
            seeded = change_config(changed, {"train.seed": seed})
            name = _name(seeded, spec)
            settings = {"output_dir": str(study.output_dir / RUNS_FOLDER / name)}
            if seeded.data is not None and seeded.data.cache_dir is None:
                settings["data.cache_dir"] = str(study.output_dir / "data_cache")
            final = change_config(seeded, settings)
            yield StudyRun(name, final, subject, (variant,), trainables, kept, _base_key(final, spec))


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


def _name(config: RunConfig, spec: TrainableSpec[Any]) -> str:
    """The method, and a digest of all settings that decide the run's results."""
    # Without defaults: a setting that later versions add must not rename the runs of today.
    settings = config.model_dump(exclude={"output_dir": True, "data": {"cache_dir"}}, exclude_defaults=True)
    settings = with_earlier_names(settings)
    if isinstance(spec, AdapterSpec):
        # The spec says it layer by layer, in one way only. qlora's name is left out since the first version.
        settings["method"] = {} if config.method.name == "qlora" else {"name": config.method.name}
        if not spec.leaves_base_clean:
            settings["method"]["merge_aware"] = True
        if config.method.init_from is not None:
            settings["method"]["init_from"] = config.method.init_from
    else:
        settings["method"] = config.method.model_dump(exclude_unset=True)
    text = json.dumps([settings, spec.describe()], sort_keys=True)
    return f"{config.method.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _base_key(config: RunConfig, spec: TrainableSpec[Any]) -> str:
    """Runs with equal keys reuse one loaded base. A run that changes its base for good gets a key of its own."""
    if not spec.leaves_base_clean:
        return config.output_dir
    parts = config.model_dump(include={"model", "quantization", "sharding"})
    train = config.train.model_dump(include={"precision", "gradient_checkpointing"})
    # The base is kept with its tokenizer, which has the run's template.
    template = [config.data.template] if config.data is not None and config.data.template != "chat" else []
    return json.dumps([parts, train, *template], sort_keys=True)


class _Skeletons:
    """Bases on the meta device, one for each model and quantization."""

    def __init__(self) -> None:
        self._known: dict[str, BaseModel] = {}

    def get(self, config: RunConfig) -> BaseModel:
        dtype: torch.dtype = compute_dtype(config.train.precision, planned_device(config.sharding.device))
        key = f"{config.model} {config.quantization} {dtype}"
        if key not in self._known:
            self._known[key] = build_skeleton(config.model, config.quantization, dtype)
        return self._known[key]
