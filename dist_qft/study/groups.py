"""Groups of linear layers, by type and by depth, and how many trainables each keeps.

A discount is counted as (parameters after) / (parameters of the reference), for a group or for all.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dist_qft.errors import UserError
from dist_qft.methods.adapters.schedule import LinearShape, TileSettings, layer_group, layer_type

TYPES = ("attention", "mlp")
THIRDS = ("early", "middle", "late")


@dataclass(frozen=True)
class Group:
    """Linear layers of a type (`layers`: a layer type, "attention", "mlp" or "all") in a range of decoder layers."""

    name: str
    layers: str = "all"
    depth: tuple[int, int] | None = None

    def __contains__(self, layer: LinearShape) -> bool:
        if self.layers not in ("all", layer_type(layer.path), layer_group(layer.path)):
            return False
        return self.depth is None or (layer.depth is not None and self.depth[0] <= layer.depth <= self.depth[1])

    def rule(self, **settings: Any) -> dict[str, Any]:
        """A rule of `method.schedule` for these layers."""
        depth = {} if self.depth is None else {"depth": list(self.depth)}
        return {"layers": self.layers, **depth, **settings}


def depth_groups(layers: Sequence[LinearShape], parts: int) -> list[Group]:
    """The decoder layers in `parts` contiguous ranges whose lengths differ by one at most; three have names."""
    count = max((layer.depth for layer in layers if layer.depth is not None), default=-1) + 1
    if count < parts:
        raise UserError(f"got {parts} parts, the model has {count} decoder layers")
    bounds = [round(index * count / parts) for index in range(parts + 1)]
    ranges = [(first, stop - 1) for first, stop in itertools.pairwise(bounds)]
    names = THIRDS if parts == len(THIRDS) else [f"layers {first}-{last}" for first, last in ranges]
    return [Group(name, depth=each) for name, each in zip(names, ranges, strict=True)]


def group_named(name: str, layers: Sequence[LinearShape]) -> Group:
    """A third of the depth for "early", "middle" or "late"; else the layers of a type."""
    if name in THIRDS:
        return depth_groups(layers, len(THIRDS))[THIRDS.index(name)]
    group = Group(name, layers=name)
    if not any(layer in group for layer in layers):
        types = dict.fromkeys(layer_type(layer.path) for layer in layers)
        raise UserError(f"'{name}' matches no layer; must be one of {', '.join([*TYPES, *THIRDS, *types])}")
    return group


def accounted_groups(layers: Sequence[LinearShape]) -> list[Group]:
    """The groups that every report counts: all, both types, and the thirds of the depth where there are three."""
    groups = [Group("total"), *(Group(name, layers=name) for name in TYPES)]
    groups = [group for group in groups if any(layer in group for layer in layers)]
    if len({layer.depth for layer in layers} - {None}) >= len(THIRDS):
        groups += depth_groups(layers, len(THIRDS))
    return groups


def trainables_of(group: Group, plan: Mapping[str, TileSettings], layers: Sequence[LinearShape]) -> int:
    """Trainable parameters that a plan has in a group."""
    return sum(plan[layer.path].parameters for layer in layers if layer in group and layer.path in plan)


def kept_shares(
    reference: Mapping[str, TileSettings], plan: Mapping[str, TileSettings], layers: Sequence[LinearShape]
) -> dict[str, float]:
    """Group name -> parameters after / parameters of the reference, for groups where the reference has any."""
    shares = {}
    for group in accounted_groups(layers):
        before = trainables_of(group, reference, layers)
        if before:
            shares[group.name] = trainables_of(group, plan, layers) / before
    return shares
