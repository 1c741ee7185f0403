"""A toy export target: one JSON file with the sum of each layer's merged weights.

Imports nothing of the tests, so that a copy of this file is a writer in a copy of the package, too.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dist_qft.config.schema import QuantizationConfig
from dist_qft.merge.difference import Difference
from dist_qft.merge.merged_weight import live_weight
from dist_qft.merge.recipe import Recipe
from dist_qft.merge.writers.merged_model import MergedModel


class SumsTarget(MergedModel):
    name = "sums"
    default_name = "sums.json"

    def recipe(self, request, config, base, tiles):
        return Recipe(request, "dense", tiles, {}, QuantizationConfig(linear="dense", embedding="dense"))

    def writer(self, live, recipe, config):
        return SumsWriter(live)


class SumsWriter:
    """A writer that is its own `target.OpenResult`."""

    def __init__(self, live) -> None:
        self.live, self.difference, self.sums = live, Difference(), {}

    def notes(self) -> list[str]:
        return []

    def wanted(self, path: str) -> tuple[str, ...]:
        return tuple(self.live.weights()[path].packed())

    def open(self, temporary: Path) -> "SumsWriter":
        self.path = temporary
        return self

    def write(self, path: str, packed: Mapping[str, Tensor]) -> None:
        weight, adapter = self.live.weights()[path], self.live.adapters.by_path.get(path)
        merged = live_weight(weight.format, packed, weight.weight_shape, adapter, torch.float64)
        self.sums[path] = float(merged.sum())

    def finish(self) -> None:
        self.path.write_text(json.dumps(self.sums))

    def close(self) -> None:
        pass
