"""What a preset varies: from its entry in the study file to schedules, one for each value and group.

The balancing factor is what an adapter compresses its input and output by. That is `balance` (lambda) of qbara, `pool`
(the group size) of qalora, and the tile, given as [repeat, pool], of qahira, where it also decides the size.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dist_qft.config.schema import MethodConfig
from dist_qft.errors import UserError
from dist_qft.methods.adapters.schedule import LinearShape, TileSettings
from dist_qft.study.discount import discount_rules
from dist_qft.study.groups import Group, depth_groups, group_named
from dist_qft.study.settings import EqualDiscount, Preset, TypePreset

REFERENCE = "reference"


@dataclass(frozen=True)
class Variant:
    """What a run changes of its reference: `group` (a type or depth) has `value` of what `preset` varies.

    Attributes:
        rules: appended to `method.schedule`; they follow from the rest.
    """

    preset: str
    group: str = ""
    value: str = ""
    rules: tuple[dict[str, Any], ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        return " ".join(part for part in (self.preset, self.group, self.value) if part)


def preset_variants(
    preset: Preset, method: MethodConfig, reference: Mapping[str, TileSettings], layers: Sequence[LinearShape]
) -> Iterator[Variant]:
    """The variants of one preset for a model's layers.

    Args:
        reference: the adapters that the base config plans.

    Raises:
        UserError: a setting the method does not have, a group that matches nothing, an impossible discount.
    """
    if isinstance(preset, EqualDiscount):
        for name in preset.groups:
            rules = discount_rules(reference, layers, group_named(name, layers), preset.discount, preset.hold)
            yield Variant(preset.preset, name, f"{preset.discount:g} {preset.hold}", tuple(rules))
        return
    for group in _groups(preset, layers):
        for value in preset.values:
            settings = _settings(preset, value, method)
            yield Variant(preset.preset, group.name, value_label(value), (group.rule(**settings),))


def value_label(value: int | float | list[int]) -> str:
    """A value as tables and figures show it: a tile as "repeat x pool"."""
    return "x".join(map(str, value)) if isinstance(value, list) else f"{value:g}"


def _groups(preset: Preset, layers: Sequence[LinearShape]) -> list[Group]:
    if isinstance(preset, TypePreset):
        return [group_named(name, layers) for name in preset.groups]
    if isinstance(preset.depths, int):
        return depth_groups(layers, preset.depths)
    return [Group(name, depth=tuple(depth)) for name, depth in preset.depths.items()]


def _settings(preset: Preset, value: int | float | list[int], method: MethodConfig) -> dict[str, Any]:
    """What a rule sets for one value."""
    knob = preset.preset.partition("_")[0]
    if knob == "alpha":
        return {"alpha": float(value)}
    if knob == "rank":
        if method.name == "qahira":
            raise UserError("qahira has no rank in any shape; vary its tile with balance_by_type or balance_by_depth")
        return {"rank": value} | ({"alpha": method.alpha / method.rank * value} if preset.keep == "scale" else {})
    if (method.name == "qahira") != isinstance(value, list):
        raise UserError(
            f"got {value}, {method.name} needs {'[repeat, pool]' if method.name == 'qahira' else 'a number'}"
        )
    match method.name:
        case "qbara":
            return {"balance": value}
        case "qalora":
            return {"pool": value}
        case "qahira":
            return {"repeat": value[0], "pool": value[1]}
    raise UserError(f"{method.name} has no balancing factor; qbara has, and with balance 1 it is qlora")
