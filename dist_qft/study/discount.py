"""Schedules that take a given number of trainables from one group of layers: the `equal_discount` preset.

Ranks are whole numbers, so one rank for the whole group would miss the wanted total by several percent. Here the
layers of the group get one of two neighbouring ranks, those with the higher one spread evenly over the depth. QA-HiRA
has no rank: its layers get one of two neighbouring tiles, multiples of the reference's pool.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from dist_qft.errors import UserError
from dist_qft.methods.adapters.schedule import LinearShape, TileSettings, layer_type
from dist_qft.study.groups import Group, trainables_of

# Of the reference's trainables. Rows of one discount then differ by twice that at most: 1 percent.
TOLERANCE = 0.005
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class _Choice:
    """One smaller adapter of a layer: its size, and the settings of the rule that gives it."""

    parameters: int
    settings: tuple[tuple[str, Any], ...]


def discount_rules(
    reference: Mapping[str, TileSettings],
    layers: Sequence[LinearShape],
    group: Group,
    discount: float,
    hold: Literal["absolute", "relative"],
) -> list[dict[str, Any]]:
    """Rules for `method.schedule` that cut `group` by `discount` of all trainables, or of the group's own.

    Raises:
        UserError: the group does not hold so many, or no choice of ranks comes within `TOLERANCE`.
    """
    members = [layer for layer in layers if layer in group and layer.path in reference]
    ladders = {layer.path: _ladder(reference[layer.path]) for layer in members}
    total = sum(settings.parameters for settings in reference.values())
    held = trainables_of(group, reference, layers)
    cut = discount * (total if hold == "absolute" else held)
    most = held - sum(ladder[-1].parameters for ladder in ladders.values())
    if cut > most:
        what = "the trainables" if hold == "absolute" else f"those of {group.name}"
        raise UserError(
            f"a discount of {discount:g} of {what} is {cut:,.0f}, {group.name} has {held:,} of {total:,} and can give "
            f"up {most:,} at most; largest possible: {most / (cut / discount):.3f}"
        )
    chosen = _choose(members, ladders, held - cut)
    reached = held - sum(choice.parameters for choice in chosen.values())
    if abs(reached - cut) > TOLERANCE * total:
        raise UserError(
            f"no choice of ranks takes {cut:,.0f} trainables from {group.name} within {TOLERANCE:.1%} of all {total:,};"
            f" the nearest takes {reached:,}: try a discount of {discount * reached / cut:.3f}"
        )
    return _rules(members, chosen)


def _ladder(settings: TileSettings) -> list[_Choice]:
    """An adapter's sizes from the reference's downwards."""
    if settings.inner is not None:
        unit = settings.parameters // settings.rank
        ranks = range(settings.rank, 0, -1)
        return [_Choice(unit * rank, (("rank", rank), ("alpha", settings.alpha_at(rank)))) for rank in ranks]
    pools = list(range(settings.pool, settings.in_features + 1, settings.pool))
    legal = [pool for pool in pools if settings.in_features % pool == 0]
    return [_Choice(settings.parameters * settings.pool // pool, (("pool", pool),)) for pool in legal]


def _choose(members: Sequence[LinearShape], ladders: Mapping[str, list[_Choice]], target: float) -> dict[str, _Choice]:
    """One size for each layer, on neighbouring rungs, whose sum is as near to `target` as an even spread gets."""

    def rung(level: int) -> dict[str, _Choice]:
        return {path: ladder[min(level, len(ladder) - 1)] for path, ladder in ladders.items()}

    def size(choices: Mapping[str, _Choice]) -> int:
        return sum(choice.parameters for choice in choices.values())

    level = 0
    while size(rung(level + 1)) > target:
        level += 1
    upper, chosen = rung(level), rung(level + 1)
    rest = target - size(chosen)
    # Multiples of the golden ratio, modulo 1, fall evenly: any first few of this order are spread over the depth.
    order = sorted(range(len(members)), key=lambda index: index * _GOLDEN % 1)
    for path in (members[index].path for index in order):
        step = upper[path].parameters - chosen[path].parameters
        if step / 2 <= rest:
            chosen[path] = upper[path]
            rest -= step
    return chosen


def _rules(members: Sequence[LinearShape], chosen: Mapping[str, _Choice]) -> list[dict[str, Any]]:
    """One rule for each run of decoder layers whose layers of a type have the same settings."""
    rules = []
    for kind in dict.fromkeys(layer_type(layer.path) for layer in members):
        own = sorted((layer for layer in members if layer_type(layer.path) == kind), key=_depth)
        # Consecutive depths with equal settings share a key: depth minus position is constant along them.
        keys = [(chosen[layer.path].settings, _depth(layer) - place) for place, layer in enumerate(own)]
        for (settings, _), run in groupby(zip(keys, own, strict=True), key=lambda pair: pair[0]):
            depths = [_depth(layer) for _, layer in run]
            rules.append(Group(kind, layers=kind, depth=(depths[0], depths[-1])).rule(**dict(settings)))
    return rules


def _depth(layer: LinearShape) -> int:
    assert layer.depth is not None, "every linear layer that is adapted is in a decoder layer"
    return layer.depth
