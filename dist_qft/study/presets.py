"""The schedules of a preset of the study file, one for each value and group.

The balancing factor is the factor by which an adapter compresses its input and output. That is `balance` (lambda) of
qbara, `pool` (the group size) of qalora, and the tile, given as [repeat, pool], of qahira, where it also decides the
size. Each method's class says which (`TileMethod.balancing`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dist_qft.config.methods.tile_method import TileMethod
from dist_qft.errors import UserError
from dist_qft.methods.adapters.schedule import LinearShape, TileSettings
from dist_qft.study.discount import discount_rules
from dist_qft.study.groups import Group, depth_groups, group_named
from dist_qft.study.settings import DepthPreset, EqualDiscount, Preset, TypePreset

REFERENCE = "reference"


@dataclass(frozen=True)
class Variant:
    """A run's change of its reference: `group` (a type or depth) has `value` of the setting that `preset` varies.

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
    preset: Preset, method: TileMethod, reference: Mapping[str, TileSettings], layers: Sequence[LinearShape]
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


def _groups(preset: TypePreset | DepthPreset, layers: Sequence[LinearShape]) -> list[Group]:
    if isinstance(preset, TypePreset):
        return [group_named(name, layers) for name in preset.groups]
    if isinstance(preset.depths, int):
        return depth_groups(layers, preset.depths)
    return [Group(name, depth=(first, last)) for name, (first, last) in preset.depths.items()]


def _settings(preset: TypePreset | DepthPreset, value: int | float | list[int], method: TileMethod) -> dict[str, Any]:
    """The settings of a rule for one value."""
    knob = preset.preset.partition("_")[0]
    if knob == "balance":
        factors = _balance(value, method)
        return factors | ({"alpha": method.alpha_held(factors)} if preset.scale == "hold" else {})
    if isinstance(value, list):
        raise UserError(f"got {value}, {knob} must be a number")
    if knob == "alpha":
        return {"alpha": float(value)}
    if not method.ranked:
        raise UserError(
            f"{method.name} has no rank in any shape; vary its {method.balancing_name} with balance_by_type or "
            "balance_by_depth"
        )
    return {"rank": value} | ({"alpha": method.alpha_at(value)} if preset.keep == "scale" else {})


def _balance(value: int | float | list[int], method: TileMethod) -> dict[str, Any]:
    """The factors that one value of the balancing factor stands for."""
    if not method.balancing:
        raise UserError(f"{method.name} has no balancing factor; qbara has, and with balance 1 it is qlora")
    values = value if isinstance(value, list) else [value]
    if isinstance(value, list) != (len(method.balancing) > 1) or len(values) != len(method.balancing):
        form = f"[{', '.join(method.balancing)}]" if len(method.balancing) > 1 else "a number"
        raise UserError(f"got {value}, {method.name}'s {method.balancing_name} must be {form}")
    return dict(zip(method.balancing, values, strict=True))
