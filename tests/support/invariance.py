"""Runs with `sharding.gradient_sum: invariant`, whose bits must not depend on ranks or engine."""

from pathlib import Path
from typing import Any

from tests.support.qst_models import qst_config
from tests.support.rank_pool import RankPool
from tests.support.tiny_model import tiny_config
from tests.support.whole_runs import METHODS as ADAPTERS
from tests.support.whole_runs import NF4, adapter_digest, train_losses

MICRO_BATCHES = 12  # 1, 2, 3 and 4 ranks share them equally
METHODS = {
    **ADAPTERS,
    "qlora, dropout": {"method": {"name": "qlora", "dropout": 0.1, "rank": 4}, "quantization": NF4},
    "qst": {},
}


def invariant_run(
    pool: RankPool, model: Path, folder: Path, method: str, engine: str, **train: Any
) -> tuple[list[float], str]:
    """Losses and the adapter's digest."""
    sections: dict[str, Any] = {key: dict(values) for key, values in METHODS[method].items()}
    sections["sharding"] = {"engine": engine, "gradient_sum": train.pop("gradient_sum", "invariant")}
    resume = train.pop("resume", None)
    sections["train"] = {
        "global_batch_size": MICRO_BATCHES,
        "per_device_train_batch_size": 1,
        "max_steps": 6,
        "lr_scheduler_type": "constant",
        **train,
    }
    config = (qst_config if method == "qst" else tiny_config)(model, folder / "run", **sections)
    losses = pool.run(train_losses, config=config, resume=resume)
    assert all(other == losses[0] for other in losses)
    return losses[0], adapter_digest(config.output_dir)
