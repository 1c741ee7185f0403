"""A new engine is a class and one more entry of `ENGINES`: runs and plans use it, and no other file has to change."""

from pathlib import Path
from typing import Self

from torch import Tensor

from dist_qft.config.schema import RunConfig
from dist_qft.plan import make_plan
from dist_qft.sharding.engines import ENGINES
from dist_qft.sharding.replicated import ReplicatedEngine
from dist_qft.training.metrics_file import read_history
from tests.support.tiny_model import tiny_config
from tests.support.whole_runs import train, train_losses


class LentEngine(ReplicatedEngine):
    """Holds the base whole, and counts as if rank 0 had sent it anew for each pass through the layers."""

    name = "lent"
    gathers_in_backward = True

    def __init__(self, *, prefetch_megabytes: float) -> None:
        super().__init__()
        self.prefetch_megabytes = prefetch_megabytes

    @classmethod
    def from_config(cls, config: RunConfig) -> Self:
        return cls(prefetch_megabytes=config.sharding.prefetch_megabytes)

    def part_bytes(self, whole: Tensor, ranks: int) -> int:
        return 2 * whole.nbytes

    def received_bytes(self, whole: Tensor, ranks: int) -> int:
        return 3 * whole.nbytes

    def after_backward(self) -> None:
        self.traffic.add(int(self.prefetch_megabytes), 0.0)


def with_lent_engine(config: RunConfig) -> RunConfig:
    """The config with an engine that the schema does not list yet, which is the third place to add one."""
    sharding = config.sharding.model_copy(update={"engine": "lent", "prefetch_megabytes": 7.0})
    return config.model_copy(update={"sharding": sharding})


def train_lent(config: RunConfig) -> tuple[list[float], int]:
    """Losses of the run, and bytes that the engine has counted."""
    ENGINES["lent"] = LentEngine
    try:
        run = train(with_lent_engine(config))
        losses = [record.loss for record in read_history(Path(config.output_dir))]
        return losses, run.parts.engine.traffic.gathered_bytes
    finally:
        del ENGINES["lent"]


def test_a_run_with_a_new_engine(pools, tiny_llama, tmp_path):
    sections = {"sharding": {"engine": "replicated"}, "train": {"max_steps": 3}}
    expected = pools[2].run(train_losses, config=tiny_config(tiny_llama, tmp_path / "replicated", **sections))
    lent = pools[2].run(train_lent, config=tiny_config(tiny_llama, tmp_path / "lent", **sections))
    assert [losses for losses, _ in lent] == expected
    assert all(counted > 0 and counted % 7 == 0 for _, counted in lent)


def test_the_plan_of_a_new_engine(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setitem(ENGINES, "lent", LentEngine)
    config = tiny_config(tiny_llama, tmp_path)
    plan = make_plan(with_lent_engine(config), world_size=2)
    fsdp = make_plan(config, world_size=2)
    assert plan["engine"] == "lent" and plan["base_bytes"] == fsdp["base_bytes"]
    assert plan["base_bytes_per_rank"] == 2 * plan["base_bytes"]
    # fsdp receives the other rank's half of what this engine receives three times.
    assert plan["gather_bytes_per_micro_batch"] == 6 * fsdp["gather_bytes_per_micro_batch"]
