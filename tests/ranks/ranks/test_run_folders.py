"""Verbs that are given a run's folder use that folder, wherever it lies and whatever its config says of its place."""

import json
import shutil
from pathlib import Path

import pytest

from dist_qft.errors import UserError
from tests.support.tiny_model import tiny_config
from tests.support.whole_runs import train_only

DATA = {"data": {"eval_samples": 4}}


@pytest.fixture(scope="module")
def runs(pools, tiny_llama, tmp_path_factory) -> list[Path]:
    """Two runs of different seeds."""
    folders = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp("runs") / f"run{seed}"
        config = tiny_config(tiny_llama, folder, train={"max_steps": 2, "seed": seed, "learning_rate": 0.05}, **DATA)
        pools[1].run(train_only, config=config)
        folders.append(folder)
    return folders


@pytest.fixture
def evaluated(shell):
    def evaluate(*words: object) -> dict:
        code, out, err = shell("eval", *words, "--json")
        assert (code, err) == (0, "")
        return json.loads(out)

    return evaluate


def test_a_copy_is_evaluated_by_its_own_checkpoint(runs, evaluated, tmp_path):
    first, second = (evaluated(run)["tuned"] for run in runs)
    assert first != second
    copy = tmp_path / "copy"
    shutil.copytree(runs[0], copy)
    shutil.rmtree(copy / "checkpoint-2")
    shutil.copytree(runs[1] / "checkpoint-2", copy / "checkpoint-2")
    found = evaluated(copy)
    assert (found["checkpoint"], found["tuned"]) == (str(copy / "checkpoint-2"), second)


def test_a_moved_run_is_evaluated_and_its_old_place_stays_empty(runs, evaluated, tmp_path):
    before = evaluated(runs[0])
    moved = tmp_path / "moved"
    shutil.copytree(runs[0], moved)
    hidden = runs[0].rename(tmp_path / "hidden")
    try:
        found = evaluated(moved)
        assert not runs[0].exists()
    finally:
        hidden.rename(runs[0])
    assert found == before | {"checkpoint": str(moved / "checkpoint-2")}
    assert evaluated(moved / "checkpoint-2") == found
    assert evaluated(runs[1], "--checkpoint", moved / "checkpoint-2") == found
    assert not (moved / "crash").exists()


def test_overrides_apply_to_the_checkpoints_config(runs, evaluated, shell):
    assert evaluated(runs[0], "data.eval_samples=2")["base"]["tokens"] < evaluated(runs[0])["base"]["tokens"]
    code, _, err = shell("eval", runs[0], "data.eval_samples=-2")
    assert code == UserError.exit_code and "data.eval_samples: got -2" in err
