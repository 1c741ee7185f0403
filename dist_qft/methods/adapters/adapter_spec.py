"""The tile adapters of a run as a `TrainableSpec`: settings by layer, written into a checkpoint and read from one."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from dist_qft.base_model.skeleton import BaseModel
from dist_qft.config.methods.tile_method import BlockMethod, TileMethod
from dist_qft.errors import UserError
from dist_qft.methods.adapters.attach import AdapterSet
from dist_qft.methods.adapters.exact_fold import folding_obstacle
from dist_qft.methods.adapters.schedule import EXPERTS, LinearShape, TileSettings, plan_adapters, type_of
from dist_qft.methods.adapters.token_rows import TrainedTokens, tokens_difference
from dist_qft.methods.trainable import Counts, TrainableSpec, section
from dist_qft.quant.experts import FrozenExperts

_TOKENS = "train_tokens"  # in adapter_config.json
# Settings of a layer's adapter that its values do not depend on, but for their scale.
_OF_TRAINING = ("alpha", "use_rslora", "dropout", "merge_aware")


@dataclass(frozen=True)
class AdapterSpec(TrainableSpec[AdapterSet]):
    """Tile adapters on linear layers and on mixtures' experts.

    Attributes:
        tiles: layer path -> adapter settings, in model order.
        made_to_merge: True for a method whose tiles are to match the base's blocks; a base without such blocks is
            then worth a warning.
        tokens: those whose rows of the vocabulary tables are trained; None without.
    """

    tiles: Mapping[str, TileSettings]
    made_to_merge: bool = False
    tokens: TrainedTokens | None = None

    peft_type: ClassVar[str] = "DIST_QFT_TILE"
    backward_through_base: ClassVar[bool] = True
    title: ClassVar[str] = "adapters"

    def names(self) -> list[str]:
        """The names of all trainables."""
        tiles = [f"{path}.{name}" for path, settings in self.tiles.items() for name in settings.shapes()]
        rows = list(self.tokens.shapes()) if self.tokens else []
        return [*rows[:1], *tiles, *rows[1:]]

    @property
    def parameters(self) -> int:
        """Number of trainable values."""
        rows = self.tokens.parameters if self.tokens else 0
        return sum(settings.parameters for settings in self.tiles.values()) + rows

    @property
    def leaves_base_clean(self) -> bool:
        """False with merge-aware adapters: the layers then compute with zeros of these adapters' own."""
        return not any(settings.merge_aware for settings in self.tiles.values())

    def describe(self) -> dict[str, Any]:
        """The settings of every adapter, and the tokens whose rows are trained."""
        tiles = {"tiles": {path: settings.to_dict() for path, settings in self.tiles.items()}}
        return tiles if self.tokens is None else {**tiles, _TOKENS: self.tokens.describe()}

    def difference(self, stored: Mapping[str, Any]) -> str | None:
        """Other tokens, or the first layer, by name, whose adapter is not the stored one: settings then and now."""
        if tokens := tokens_difference(self.tokens, section(stored, _TOKENS)):
            return tokens
        saved, wanted = section(stored, "tiles"), self.describe()["tiles"]
        for path in sorted({*saved, *wanted}):
            if saved.get(path) == wanted.get(path):
                continue
            before, now = section(saved, path), section(wanted, path)
            changes = [
                f"{key} was {before.get(key, 'absent')}, the config says {now.get(key, 'absent')}"
                for key in {**before, **now}
                if before.get(key) != now.get(key)
            ]
            return f"adapter of {path}: {'; '.join(changes) or 'its settings are not those of a layer'}"
        return None

    def starting_values(
        self, stored: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str
    ) -> Mapping[str, Tensor]:
        """See `TrainableSpec`: with another scale the last factor makes up for it, in which dW is linear."""
        saved, now = section(stored, "tiles"), self.describe()["tiles"]
        as_now = {
            path: {key: value for key, value in section(saved, path).items() if key not in _OF_TRAINING}
            | {key: value for key, value in section(now, path).items() if key in _OF_TRAINING}
            for path in saved
        }
        super().starting_values({**stored, "tiles": as_now}, tensors, where)
        found = dict(tensors)
        for path, settings in self.tiles.items():
            name = f"{path}.{list(settings.shapes())[-1]}"
            factor = TileSettings.from_dict(saved[path], f"{where}: {path}").scale / settings.scale
            if factor != 1.0 and name in found:
                found[name] = found[name] * factor
        return found

    def summary(self) -> str:
        """The number of layers that have an adapter, and of tokens that have rows."""
        tokens = f" and {len(self.tokens.ids)} tokens" if self.tokens else ""
        return f"{len(self.tiles)} layers{tokens}"

    def warnings(self, base: BaseModel) -> list[str]:
        """Experts that get no adapters; an obstacle to the exact merge, for a method that is made for it."""
        lines = [] if base.experts.keys() <= self.tiles.keys() else [_experts_line(base, self.tiles)]
        obstacle = folding_obstacle(self.tiles, base.matrices) if self.made_to_merge else None
        return lines if obstacle is None else [*lines, f"method.name: will not merge exactly: {obstacle}"]

    def counts(self, base: BaseModel) -> Counts:
        """Trainable parameters by layer type and by depth; one row for each type, size and setting."""
        by_type: Counter[str] = Counter()
        by_depth = [0] * len(base.layers)
        for path, settings in self.tiles.items():
            by_type[type_of(settings, path)] += settings.parameters
            if (depth := base.depth_of(path)) is not None:
                by_depth[depth] += settings.parameters
        kinds = Counter((type_of(settings, path), settings) for path, settings in self.tiles.items())
        rows = [_row(name, settings, count) for (name, settings), count in kinds.items()]
        if self.tokens is not None:
            by_type["tokens"] = self.tokens.parameters
            rows += [_token_row(*shape) for shape in self.tokens.shapes().values()]
        return Counts(dict(by_type), by_depth, rows)

    def build(self, seed: int) -> AdapterSet:
        """Fresh adapters on the CPU."""
        return AdapterSet.build(self.tiles, seed, self.tokens)


def adapter_spec(method: TileMethod, base: BaseModel) -> AdapterSpec:
    """The adapters that a config's `method` section puts on this base.

    Raises:
        UserError: the section does not fit the base's layers, or asks for merge-aware training of adapters that do not
            merge exactly.
    """
    spec = AdapterSpec(plan_adapters(method, linear_shapes(base)), made_to_merge=isinstance(method, BlockMethod))
    if not spec.leaves_base_clean:
        obstacle = folding_obstacle(spec.tiles, base.matrices)
        if obstacle is not None:
            raise UserError(f"method.merge_aware: no exact merge: {obstacle}")
    return spec


def stored_adapters(stored: Mapping[str, Any], where: str) -> AdapterSpec:
    """The spec that `describe` wrote into a checkpoint; `where` names the file, for messages."""
    tiles, tokens = stored.get("tiles"), stored.get(_TOKENS)
    if not isinstance(tiles, Mapping):
        raise UserError(f"{where}: tiles: got {type(tiles).__name__}, must be an object of layers")
    return AdapterSpec(
        {path: TileSettings.from_dict(fields, where=f"{where}: {path}") for path, fields in tiles.items()},
        tokens=None if tokens is None else TrainedTokens.read(tokens, where),
    )


def require_tiles(spec: TrainableSpec[Any]) -> Mapping[str, TileSettings]:
    """The tiles of a spec, which must be of adapters; the config check refuses everything else before a merge."""
    if not isinstance(spec, AdapterSpec):
        raise TypeError(f"need a spec of tile adapters, got {type(spec).__name__}")
    return spec.tiles


def linear_shapes(base: BaseModel) -> list[LinearShape]:
    """The base's linear layers and experts as the method's schedule sees them, in model order."""
    return [
        LinearShape(
            path,
            layer.in_features,
            layer.out_features,
            base.depth_of(path),
            layer.experts if isinstance(layer, FrozenExperts) else None,
        )
        for path, layer in base.matrices.items()
    ]


def _experts_line(base: BaseModel, tiles: Mapping[str, TileSettings]) -> str:
    bare = sum(math.prod(stack.full_shape) for path, stack in base.experts.items() if path not in tiles)
    share = bare / sum(math.prod(layer.full_shape) for layer in base.matrices.values())
    return (
        f"method.targets: experts with {share:.0%} of the decoder's weights stay as they are and get no adapters; "
        f"'{EXPERTS}' in the list selects them"
    )


def _row(name: str, settings: TileSettings, count: int) -> dict[str, Any]:
    """A table row for `count` adapters of equal settings on layers of one type."""
    return {
        "layer_type": name,
        "layers": count,
        "shape": [*([settings.experts] if settings.experts else []), settings.out_features, settings.in_features],
        "tile": [settings.repeat, settings.pool],
        "max_rank": settings.max_rank,
        "scale": settings.scale,
        "parameters": count * settings.parameters,
    }


def _token_row(count: int, width: int) -> dict[str, Any]:
    """A table row for the rows of `count` tokens in one vocabulary table."""
    return {
        "layer_type": "tokens",
        "layers": 1,
        "shape": [count, width],
        "tile": [1, 1],
        "max_rank": min(count, width),
        "scale": 1.0,
        "parameters": count * width,
    }
