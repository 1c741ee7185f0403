"""Export targets: the door lists the schema's, and a new one is a class and a line in the door."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from dist_qft.config.schema import MergeTarget, QuantizationConfig
from dist_qft.merge.certificate_file import read_certificate
from dist_qft.merge.difference import Difference
from dist_qft.merge.merged_weight import live_weight
from dist_qft.merge.recipe import Recipe
from dist_qft.merge.targets import TARGETS
from dist_qft.merge.writers.merged_model import MergedModel
from tests.support.merges import merge_run


def test_the_door_lists_the_targets_of_the_schema():
    assert tuple(TARGETS) == get_args(MergeTarget)
    assert all(target.name == name for name, target in TARGETS.items())


class Sums(MergedModel):
    """A toy target: one JSON file with the sum of each layer's merged weights."""

    name = "dense"
    default_name = "sums.json"

    def recipe(self, request, config, base, tiles):
        return Recipe(request, "dense", tiles, {}, QuantizationConfig(linear="dense", embedding="dense"))

    def writer(self, live, recipe, config):
        return SumsWriter(live)


class SumsWriter:
    """Also what it opens: a `target.OpenResult`."""

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


def merge_to_sums(source: Path, path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TARGETS, "dense", Sums())
        merge_run(source, "dense", path)


def test_a_toy_target_is_planned_written_and_certified(pools, gguf_run, tmp_path):
    path = tmp_path / "sums.json"
    pools[2].run(merge_to_sums, source=gguf_run, path=path)
    sums = json.loads(path.read_text())
    assert len(sums) == 23 and all(isinstance(value, float) for value in sums.values())
    _, said = read_certificate(path)
    assert said.kind == "dense" and said.logits.maximum < 1e-4
