"""Export targets: the door lists the schema's, and a new one is a class and a line in the door."""

import json
from pathlib import Path
from typing import get_args

import pytest

from dist_qft.config.schema import MergeTarget
from dist_qft.merge.certificate_file import read_certificate
from dist_qft.merge.targets import TARGETS
from tests.support.merges import merge_run
from tests.support.sums_target import SumsTarget


def test_the_door_lists_the_targets_of_the_schema():
    assert tuple(TARGETS) == get_args(MergeTarget)
    assert all(target.name == name for name, target in TARGETS.items())


class Sums(SumsTarget):
    """The toy target under the name of one that the schema knows."""

    name = "dense"


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
