"""The study file: its sections, types and ranges, and how it is read.

The meaning of a preset or an axis for a model belongs to `presets` and `rows`, which place their faults by
`Study.place`.
"""

import difflib
import itertools
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

from dist_qft.config.document import Document
from dist_qft.config.fault import KeyPath, dotted
from dist_qft.config.load import change_config, load_config
from dist_qft.config.schema import RunConfig
from dist_qft.config.section import NonNegative, Positive, PositiveNumber, Section, Seed, Text
from dist_qft.errors import UserError
from dist_qft.study.stages import Contrast, Keep, MergeStage, TuneMetric, TuneSettings, When

Pair = Annotated[list[Positive], Field(min_length=2, max_length=2)]
Range = Annotated[list[NonNegative], Field(min_length=2, max_length=2)]
Scale = Annotated[
    Literal["free", "hold"],
    Field(
        description="with a balancing factor: alpha stays and a step moves dW less the larger the factor (free), or "
        "alpha grows with it and a step moves dW by the same (hold)"
    ),
]


class TypePreset(Section):
    """One setting, varied in one group of layer types at a time; the other layers keep the reference's."""

    preset: Literal["rank_by_type", "balance_by_type", "alpha_by_type"]
    values: list[Positive | PositiveNumber | Pair] = Field(min_length=1)
    groups: list[Text] = Field(["attention", "mlp"], min_length=1, description="layer types, 'attention' or 'mlp'")
    scale: Scale = "free"
    keep: Literal["scale", "alpha"] = Field("scale", description="with a rank: alpha / rank stays, or alpha does")
    when: When = {}


class DepthPreset(Section):
    """One setting, varied in one range of decoder layers at a time."""

    preset: Literal["rank_by_depth", "balance_by_depth"]
    values: list[Positive | PositiveNumber | Pair] = Field(min_length=1)
    depths: Annotated[int, Field(ge=2)] | dict[Text, Range] = Field(
        3, description="number of equal parts, or name -> first and last decoder layer"
    )
    scale: Scale = "free"
    keep: Literal["scale", "alpha"] = Field("scale", description="with a rank: alpha / rank stays, or alpha does")
    when: When = {}


class EqualDiscount(Section):
    """The same number of trainables taken from one group at a time."""

    preset: Literal["equal_discount"]
    discount: Annotated[float, Field(gt=0, lt=1)] = Field(description="share that is cut")
    hold: Literal["absolute", "relative"] = Field(
        "absolute", description="share of all trainables (equal totals), or of the group's own"
    )
    groups: list[Text] = Field(["attention", "mlp", "early", "middle", "late"], min_length=1)
    when: When = {}


Preset = TypePreset | DepthPreset | EqualDiscount
_PRESETS: dict[str, type[Section]] = {
    name: kind
    for kind in (TypePreset, DepthPreset, EqualDiscount)
    for name in get_args(kind.model_fields["preset"].annotation)
}
_SECTIONS: dict[KeyPath, type[Section]] = {
    ("tune",): TuneSettings,
    ("tune", "metric"): TuneMetric,
    ("merge",): MergeStage,
    ("contrasts",): Contrast,
}


class StudySettings(Section):
    """The whole file."""

    base: Text = Field(description="config of the reference run; relative to this file")
    output_dir: Text = Field(description="runs and report go there")
    set: dict[Text, Any] = Field({}, description="key.sub -> value: settings that replace the base config's")
    seeds: list[Seed] = Field([0], min_length=1)
    metric: Text = Field("loss", description="held-out figure that is compared: loss, or a metric such as accuracy")
    axes: dict[Text, list[Any] | dict[Text, dict[Text, Any]]] = Field(
        {}, description="key.sub -> values, or name -> {label: {key.sub: value}}; all combinations are run"
    )
    presets: list[Annotated[Preset, Field(discriminator="preset")]] = []
    tune: TuneSettings | None = Field(None, description="a search for the best rate before the runs")
    merge: list[MergeStage] = Field([], description="merges of the runs' adapters; the first that applies to a run")
    tasks: list[Text] = Field(
        [],
        description="tasks of lm-evaluation-harness, as figures task/<task>/<metric>; of merged files merged_task/...",
    )
    tasks_path: Text | None = Field(None, description="folder of task files that the harness does not bring along")
    contrasts: list[Contrast] = []
    keep: Keep = []

    @field_validator("merge", mode="before")
    @classmethod
    def _one_merge(cls, given: Any) -> Any:
        """A single merge needs no list."""
        return [given] if isinstance(given, dict) else given


@dataclass(frozen=True)
class Study:
    """A study file and the config it starts from, with `set` applied."""

    document: Document
    settings: StudySettings
    base: RunConfig

    @property
    def output_dir(self) -> Path:
        return Path(self.settings.output_dir)

    @cached_property
    def title(self) -> str:
        """The study's name for headings: that of its output folder."""
        return self.output_dir.name

    def place(self, *path: str | int) -> str:
        """`file:line: key`, for a message on a key's value."""
        return f"{_line(self.document, path)}: {dotted(path)}"


def load_study(path: str | Path) -> Study:
    """The study in the file `path`.

    Raises:
        UserError: the file or its base config cannot be read; or, one line each, every fault of the file.
    """
    document = Document.read(path)
    try:
        settings = StudySettings.model_validate(document.values)
    except ValidationError as error:
        lines = [_fault(document, item) for item in error.errors(include_url=False)]
        raise UserError("\n".join(dict.fromkeys(lines))) from None
    faults = [f"{_line(document, path)}: {message}" for path, message in _contradictions(settings)]
    if faults:
        raise UserError("\n".join(faults))
    base = load_config(Path(path).parent / settings.base)
    try:
        base = change_config(base, settings.set)
    except UserError as error:
        raise UserError(f"{_line(document, ('set',))}: set: {error}") from None
    return Study(document, settings, base)


def _contradictions(settings: StudySettings) -> list[tuple[KeyPath, str]]:
    """Faults between keys, each with its place."""
    faults: list[tuple[KeyPath, str]] = []
    if not settings.axes and not settings.presets:
        faults.append((("base",), "nothing varies: need axes or presets"))
    if len(set(settings.seeds)) < len(settings.seeds):
        faults.append((("seeds",), f"seeds: got {settings.seeds}, each seed once"))
    for name, values in settings.axes.items():
        if not values:
            faults.append((("axes", name), f"axes.{name}: the grid is empty, must be at least one value"))
    for index, preset in enumerate(settings.presets):
        faults += _when_faults(("presets", index), preset.when, settings)
        if isinstance(preset, TypePreset | DepthPreset):
            faults += _value_faults(index, preset)
    for index, choice in enumerate(settings.tune.metric if settings.tune else []):
        faults += _when_faults(("tune", "metric", index), choice.when, settings)
    for index, stage in enumerate(settings.merge):
        faults += _when_faults(("merge", index), stage.when, settings)
    if settings.tasks_path is not None and not settings.tasks:
        faults.append((("tasks_path",), "tasks_path: no effect without tasks; give those or remove this"))
    return faults + _contrast_faults(settings)


def _when_faults(path: KeyPath, when: dict[str, str], settings: StudySettings) -> list[tuple[KeyPath, str]]:
    faults: list[tuple[KeyPath, str]] = []
    for axis, label in when.items():
        labels = axis_labels(settings.axes[axis]) if axis in settings.axes else None
        if labels is None or label not in labels:
            allowed = f"an axis ({', '.join(settings.axes)})" if labels is None else f"one of {', '.join(labels)}"
            given = axis if labels is None else label
            faults.append(((*path, "when"), f"{dotted(path)}.when: got '{given}', must be {allowed}"))
    return faults


def _contrast_faults(settings: StudySettings) -> list[tuple[KeyPath, str]]:
    """Contrasts of combinations that there are not, or of one with itself."""
    combinations = itertools.product(*(axis_labels(values) for values in settings.axes.values()))
    known = [", ".join(labels) for labels in combinations]
    faults: list[tuple[KeyPath, str]] = []
    for index, contrast in enumerate(settings.contrasts):
        path: KeyPath = ("contrasts", index)
        for side in ("better", "than"):
            if (label := getattr(contrast, side)) not in known:
                place = (*path, side)
                faults.append((place, f"{dotted(place)}: got '{label}', must be one of {'; '.join(known)}"))
        first, second = contrast.figures(settings.metric)
        if contrast.better == contrast.than and first == second:
            faults.append((path, f"{dotted(path)}: got '{contrast.better}' twice, must be two that differ"))
    return faults


def _value_faults(index: int, preset: TypePreset | DepthPreset) -> list[tuple[KeyPath, str]]:
    knob = preset.preset.partition("_")[0]
    scale: KeyPath = ("presets", index, "scale")
    if knob != "balance" and "scale" in preset.model_fields_set:
        return [(scale, f"{dotted(scale)}: only for balancing factors; remove it")]
    kinds: dict[str, type | tuple[type, ...]] = {"rank": int, "alpha": (int, float), "balance": (int, list)}
    allowed = {
        "rank": "whole numbers",
        "alpha": "numbers",
        "balance": "whole numbers, or for qahira and qablora [repeat, pool]",
    }
    path: KeyPath = ("presets", index, "values")
    key = dotted(path)
    faults = [
        (path, f"{key}: got {v}, must be {allowed[knob]}") for v in preset.values if not isinstance(v, kinds[knob])
    ]
    if knob != "rank" and "keep" in preset.model_fields_set:
        faults.append((("presets", index, "keep"), f"presets.{index}.keep: only for ranks; remove it"))
    return faults


def axis_labels(values: list[Any] | dict[str, dict[str, Any]]) -> list[str]:
    """The names of an axis's values in tables and in `when`."""
    return list(values) if isinstance(values, dict) else [str(value) for value in values]


def _line(document: Document, path: KeyPath) -> str:
    """`file:line` of a key, or of the nearest section around it."""
    for length in range(len(path), 0, -1):
        if line := document.line(path[:length]):
            return f"{document.path}:{line}"
    return str(document.path)


def _fault(document: Document, item: ErrorDetails) -> str:
    """One of pydantic's errors as one line."""
    path = _given_path(item["loc"], document.values)
    where, key = _line(document, path), dotted(path)
    if item["type"] == "missing":
        return f"{where}: {dotted((*path, item['loc'][-1]))}: missing"
    if item["type"] == "extra_forbidden":
        preset = _PRESETS.get(document.values["presets"][path[1]]["preset"]) if path[0] == "presets" else None
        around = (_SECTIONS.get(path[:length]) for length in range(len(path) - 1, 0, -1))
        section = preset or next(filter(None, around), StudySettings)
        allowed = [*section.model_fields]
        near = difflib.get_close_matches(str(path[-1]), allowed, n=1)
        hint = f", did you mean '{near[0]}'?" if near else f", allowed here: {', '.join(allowed)}"
        return f"{where}: unknown key '{key}'{hint}"
    if item["type"] == "union_tag_invalid":
        return f"{where}: {key}.preset: got '{item['input'].get('preset')}', must be one of {', '.join(_PRESETS)}"
    if item["type"] == "union_tag_not_found":
        return f"{where}: {key}: missing 'preset', must be one of {', '.join(_PRESETS)}"
    need = item["msg"].removeprefix("Input should be ").replace("List should have", "a list with")
    return f"{where}: {key}: got {item['input']!r}, must be {need}"


def _given_path(location: KeyPath, values: Any) -> KeyPath:
    """A pydantic location without the parts that are not in the file: tags of unions, and a missing key at its end."""
    path: list[str | int] = []
    for part in location:
        if part in (range(len(values)) if isinstance(values, list) else values if isinstance(values, dict) else ()):
            values = values[part]
            path.append(part)
    return tuple(path)
