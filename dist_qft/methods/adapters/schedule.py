"""The adapter of each linear layer: one `TileSettings` per layer, from the config's `method` section.

Pure arithmetic on names and sizes: no torch, no weights, so `validate` can run it on a model's config.json
alone. The methods are settings of one class (`tile_adapter.TileAdapter`), not classes of their own.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from dist_qft.config.methods.tile_method import ScheduleRule, TileMethod
from dist_qft.config.section import Fraction, Positive, Section
from dist_qft.divisors import either, nearest_divisors
from dist_qft.errors import UserError
from dist_qft.storage.stored_faults import every_fault

# A parent module's name decides the group (self_attn.dense and mlp.dense differ); the layer's own name
# decides where the parent says nothing (OPT's fc1 and fc2 sit directly in the decoder layer).
_GROUP_PARENTS = {"attention": ("attn", "attention"), "mlp": ("mlp", "ffn", "feed_forward")}
_GROUP_LAYERS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj", "query_key_value"),
    "mlp": ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2"),
}
_EVERYTHING = ("all", "all-linear")
EXPERTS = "experts"  # selects the experts of mixtures, which `all` leaves out


@dataclass(frozen=True)
class LinearShape:
    """A linear layer as the schedule sees it.

    `path` is its dotted module path ("model.layers.3.self_attn.q_proj"), `depth` the index of its decoder
    layer, or None for a layer outside the decoder stack. `experts` is the number of matrices of these sizes where the
    layer is one product of a mixture's experts, None for a linear layer.
    """

    path: str
    in_features: int
    out_features: int
    depth: int | None
    experts: int | None = None


class TileSettings(Section):
    """Everything that defines one layer's adapter except its values.

    dW = tile_scale * M (x) ones(repeat, pool), with M = A or M = B A. `rank` is the nominal rank r: it sets the
    scale alpha / r, while `inner`, the number of rows of A when there is a B, may be a multiple of it (None: the
    single matrix of QA-HiRA). With `experts` E there is such an adapter for each of E matrices of these sizes.
    Construction raises ValueError when pool or repeat does not divide the layer.
    """

    in_features: Positive
    out_features: Positive
    pool: Positive
    repeat: Positive
    rank: Positive
    alpha: float = Field(gt=0)
    inner: Positive | None
    pool_mode: Literal["mean", "sum"] = "mean"
    dropout: Fraction = 0.0
    merge_aware: bool = False
    use_rslora: bool = False
    experts: Positive | None = None

    @model_validator(mode="after")
    def _tiles_fill_the_layer(self) -> "TileSettings":
        for factor, size in (("pool", "in_features"), ("repeat", "out_features")):
            if getattr(self, size) % getattr(self, factor):
                raise ValueError(f"{factor} {getattr(self, factor)} does not divide {size} {getattr(self, size)}")
        return self

    @property
    def scale(self) -> float:
        """LoRA's alpha / r; with `use_rslora` alpha / sqrt(r) (arXiv 2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def alpha_at(self, rank: int) -> float:
        """The alpha that gives an adapter of another nominal rank this one's scale."""
        return self.scale * (math.sqrt(rank) if self.use_rslora else rank)

    @property
    def tile_scale(self) -> float:
        """Factor from M to the value of a tile of dW: alpha / r, and 1 / pool when inputs are averaged."""
        return self.scale / self.pool if self.pool_mode == "mean" else self.scale

    @property
    def parameters(self) -> int:
        """Number of trainable values."""
        return sum(rows * columns for rows, columns in self.shapes().values())

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Shape (rows, columns) of each trainable matrix, "A" first; those of experts lie below each other."""
        tiles_in, tiles_out = self.in_features // self.pool, self.out_features // self.repeat
        matrices = self.experts or 1
        if self.inner is None:
            return {"A": (matrices * tiles_out, tiles_in)}
        return {"A": (matrices * self.inner, tiles_in), "B": (matrices * tiles_out, self.inner)}

    @property
    def max_rank(self) -> int:
        """The largest rank that dW of one matrix can have."""
        tiles = min(self.in_features // self.pool, self.out_features // self.repeat)
        return tiles if self.inner is None else min(tiles, self.inner)

    def to_dict(self) -> dict[str, object]:
        """The settings as JSON values for `adapter_config.json`; later keys only where they are used."""
        return self.model_dump(exclude={key for key in ("use_rslora", "experts") if not getattr(self, key)})

    @classmethod
    def from_dict(cls, fields: object, where: str = "adapter settings") -> "TileSettings":
        """The inverse of `to_dict`; `where` names the source in the UserError that lists what is wrong."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise UserError(f"{where}: {every_fault(error)}") from None


@dataclass
class _Draft:
    """A targeted layer while the rules are applied: each knob's value and the config key it came from."""

    layer: LinearShape
    values: dict[str, Any]
    keys: dict[str, str]
    skip: bool = False


def layer_type(path: str) -> str:
    """The last component of a module path: "q_proj"."""
    return path.rpartition(".")[2]


def type_of(layer: LinearShape | TileSettings, path: str) -> str:
    """The type of a layer, "q_proj", and of a product of experts with their name: "experts.down_proj"."""
    return layer_type(path) if layer.experts is None else f"{EXPERTS}.{layer_type(path)}"


def layer_group(path: str) -> str | None:
    """The group of a layer, "attention" or "mlp", or None when neither its parents nor its own name tell."""
    *parents, name = path.split(".")
    for parent in reversed(parents):
        for group, marks in _GROUP_PARENTS.items():
            if any(mark in parent for mark in marks):
                return group
    return next((group for group, names in _GROUP_LAYERS.items() if name in names), None)


def plan_adapters(method: TileMethod, layers: list[LinearShape]) -> dict[str, TileSettings]:
    """Settings of every adapter by layer path, in the order of `layers` (model order).

    `method.targets` selects layers, then the schedule's rules apply in order and later rules win, setting by
    setting; `skip: true` drops a layer until a later rule says `skip: false`. Rules that are wrong in themselves are
    refused by the config's check.

    Raises UserError for: a selection or rule that matches nothing, a depth outside the model, and, all layers gathered
    into one error, factors that do not divide a layer's sizes.
    """
    if not layers:
        raise UserError("method.targets: the model has no linear layer that could carry an adapter")
    values = method.given(method)
    keys = {knob: f"method.{knob}" for knob in values}
    targets = _select(method.targets, layers, "method.targets")
    drafts = [_Draft(layer, dict(values), dict(keys)) for layer in targets]
    for index, rule in enumerate(method.schedule):
        _apply(rule, method.given(rule), f"method.schedule.{index}", drafts, layers)
    drafts = [draft for draft in drafts if not draft.skip]
    if not drafts:
        raise UserError("method.schedule: every targeted layer is skipped, nothing is left to train")
    faults = _indivisible(method.factors, drafts)
    if faults:
        raise UserError("\n".join(faults))
    return {draft.layer.path: _settings(method, draft) for draft in drafts}


def _matches(selector: str, layer: LinearShape) -> bool:
    if layer.experts is not None:
        return selector in (EXPERTS, type_of(layer, layer.path))
    return selector in (*_EVERYTHING, layer_type(layer.path), layer_group(layer.path))


def _select(selectors: str | list[str], layers: list[LinearShape], key: str) -> list[LinearShape]:
    """The layers that any selector matches; each selector must match one, so that a typo cannot pass."""
    selectors = [selectors] if isinstance(selectors, str) else selectors
    types = list(dict.fromkeys(type_of(layer, layer.path) for layer in layers))
    known = f"linear layers of this model: {', '.join(types)}"
    if not selectors:
        raise UserError(f"{key}: the list is empty; {known}")
    for selector in selectors:
        if not any(_matches(selector, layer) for layer in layers):
            near = difflib.get_close_matches(selector, [*types, EXPERTS, *_GROUP_PARENTS, *_EVERYTHING], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"{key}: {selector!r} matches no layer; {known}{hint}")
    return [layer for layer in layers if any(_matches(selector, layer) for selector in selectors)]


def _apply(
    rule: ScheduleRule, knobs: dict[str, Any], key: str, drafts: list[_Draft], layers: list[LinearShape]
) -> None:
    """Write one rule's settings into the drafts that it selects."""
    selected = set(_select(rule.layers, layers, f"{key}.layers")) & _in_depth(rule.depth, layers, f"{key}.depth")
    matched = [draft for draft in drafts if draft.layer in selected]
    if not matched:
        raise UserError(f"{key}: matches none of the layers that method.targets selects")
    for draft in matched:
        draft.values.update(knobs)
        draft.keys.update({knob: f"{key}.{knob}" for knob in knobs})
        if "skip" in rule.model_fields_set:
            draft.skip = rule.skip


def _in_depth(depth: list[int] | None, layers: list[LinearShape], key: str) -> set[LinearShape]:
    """The layers of decoder layers first to last, both included; all layers for None."""
    if depth is None:
        return set(layers)
    first, last = depth
    deepest = max((layer.depth for layer in layers if layer.depth is not None), default=-1)
    if last > deepest:
        raise UserError(f"{key}: got [{first}, {last}], must end at {deepest} or before, the last decoder layer")
    return {layer for layer in layers if layer.depth is not None and first <= layer.depth <= last}


def _indivisible(factors: Mapping[str, tuple[str, ...]], drafts: list[_Draft]) -> list[str]:
    """One line for each kind of layer (same type, sizes and setting) with a size that a factor does not divide."""
    cases: dict[tuple[str, int, tuple[str, ...], tuple[int, ...], str], list[str]] = {}
    for draft in drafts:
        for knob, dimensions in factors.items():
            factor = draft.values[knob]
            sizes = tuple(getattr(draft.layer, dimension) for dimension in dimensions)
            if math.gcd(*sizes) % factor:
                case = (draft.keys[knob], factor, dimensions, sizes, type_of(draft.layer, draft.layer.path))
                cases.setdefault(case, []).append(draft.layer.path)
    lines = []
    for (key, factor, dimensions, sizes, kind), paths in cases.items():
        named = " and ".join(f"{dimension} {size}" for dimension, size in zip(dimensions, sizes, strict=True))
        nearest = either(nearest_divisors(math.gcd(*sizes), factor))
        where = paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more {kind}"
        lines.append(f"{key}: {factor} does not divide {named} of {where}; nearest that does: {nearest}")
    return lines


def _settings(method: TileMethod, draft: _Draft) -> TileSettings:
    tile = method.tile(draft.values)
    return TileSettings(
        in_features=draft.layer.in_features,
        out_features=draft.layer.out_features,
        pool=tile.pool,
        repeat=tile.repeat,
        rank=draft.values["rank"],
        alpha=draft.values["alpha"],
        inner=tile.inner,
        experts=draft.layer.experts,
        **method.options(),
    )
