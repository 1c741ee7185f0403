"""Dropout, precision and checkpointing in whole runs: what may change the numbers, and what may not."""

from pathlib import Path

import pytest

from tests.support.rank_pool import RankPool
from tests.support.tiny_model import tiny_config
from tests.support.whole_runs import train_losses

DROPOUT = {"method": {"dropout": 0.3}}


def losses(pool: RankPool, model: Path, folder: Path, **sections: dict) -> list[float]:
    sections["train"] = {"max_steps": 3, **sections.get("train", {})}
    results = pool.run(train_losses, config=tiny_config(model, folder / "run", **sections))
    assert all(result == results[0] for result in results), "ranks report different losses"
    return results[0]


@pytest.fixture(scope="module")
def dropped(pools, tiny_llama, tmp_path_factory) -> list[float]:
    """Losses with dropout on one rank that holds the whole base."""
    return losses(pools[1], tiny_llama, tmp_path_factory.mktemp("one"), sharding={"engine": "replicated"}, **DROPOUT)


@pytest.mark.parametrize(
    ("world", "engine", "checkpointing"), [(2, "fsdp", False), (4, "replicated", False), (2, "fsdp", True)]
)
def test_dropout_masks_belong_to_the_micro_batch(pools, tiny_llama, tmp_path, dropped, world, engine, checkpointing):
    """Not to the rank, the engine or the pass: activation checkpointing recomputes with the same masks."""
    train = {"gradient_checkpointing": checkpointing}
    found = losses(pools[world], tiny_llama, tmp_path, sharding={"engine": engine}, train=train, **DROPOUT)
    assert found == pytest.approx(dropped, rel=1e-4)


def test_dropout_is_alive(pools, tiny_llama, tmp_path, dropped):
    assert losses(pools[1], tiny_llama, tmp_path, sharding={"engine": "replicated"}) != pytest.approx(dropped, rel=1e-4)


def test_bfloat16_learns_what_float32_learns(pools, tiny_llama, tmp_path):
    exact = losses(pools[2], tiny_llama, tmp_path / "float32")
    rounded = losses(pools[2], tiny_llama, tmp_path / "bfloat16", train={"precision": "bfloat16"})
    assert rounded == pytest.approx(exact, rel=2e-2)
    assert rounded != exact
    assert rounded[-1] < rounded[0]
