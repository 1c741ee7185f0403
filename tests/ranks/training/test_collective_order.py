"""Every rank takes part in the same collectives in the same order, also one whose last micro-batches are empty."""

from pathlib import Path
from typing import Any

import pytest

from dist_qft.config.schema import RunConfig
from tests.support.collectives import recorded_collectives
from tests.support.invariance import METHODS
from tests.support.qst_models import qst_config
from tests.support.tiny_model import tiny_config
from tests.support.whole_runs import train_only

# Each method and each engine, with the reductions and the optimizer in all their forms.
RUNS = [
    ("qlora, dropout", "fsdp", {}, True),
    ("qahira", "zero", {"gradient_sum": "invariant"}, True),
    ("qbara", "replicated", {}, False),
    ("qalora", "zero", {}, True),
    ("qahira, merge-aware", "fsdp", {"gradient_sum": "invariant"}, False),
    ("qst", "fsdp", {}, True),
]


def logged(config: RunConfig) -> list[tuple[str, str, int]]:
    with recorded_collectives() as log:
        train_only(config)
    return log


@pytest.mark.parametrize(("method", "engine", "sharding", "shard"), RUNS, ids=lambda value: str(value))
def test_the_ranks_collectives_are_the_same(pools, tiny_llama, tmp_path: Path, method, engine, sharding, shard):
    sections: dict[str, Any] = {key: dict(values) for key, values in METHODS[method].items()}
    sections["sharding"] = {"engine": engine, **sharding}
    # One step of 8 places for 3 rows: the second rank's second micro-batch, at least, has none.
    sections["train"] = {
        "max_steps": None,
        "num_train_epochs": 0.05,
        "global_batch_size": 8,
        "per_device_train_batch_size": 2,
        "shard_optimizer": shard,
    }
    config = (qst_config if method == "qst" else tiny_config)(tiny_llama, tmp_path / "run", **sections)
    first, second = pools[2].run(logged, config=config)
    assert first == second
    operations = {name for _, name, _ in first}
    assert ("alltoall_base" in operations) == (shard or sharding.get("gradient_sum") == "invariant")
    assert any("allgather" in name for name in operations) or (engine, shard) == ("replicated", False)
    assert len({group for group, _, _ in first}) >= 2, "the gradients have a group of their own"
