"""Whole training runs inside a rank pool: the product's own stages, minus the launcher."""

import hashlib
from pathlib import Path

import torch
import torch.distributed as dist

from dist_qft.config.schema import RunConfig
from dist_qft.ranks.preemption import StopSignal
from dist_qft.ranks.world import World
from dist_qft.storage.checkpoint import ADAPTER_MODEL, list_checkpoints
from dist_qft.train import execute_run, gather_inputs
from dist_qft.training.metrics_file import read_history
from dist_qft.training.training_run import TrainingRun

# Method sections of every adapter for the small model, each on a base of its own format.
NF4 = {"linear": "nf4", "block": [64]}
METHODS = {
    "qlora": {"method": {"name": "qlora", "rank": 4}, "quantization": NF4},
    "qbara": {"method": {"name": "qbara", "rank": 4}, "quantization": NF4},
    "qalora": {"method": {"name": "qalora", "rank": 4, "pool": 32}, "quantization": {"block": [1, 32]}},
    "qahira": {},
    "qablora": {"method": {"name": "qablora", "rank": 4, "pool": 4, "repeat": 8, "use_rslora": True}},
    "qahira, merge-aware": {"method": {"merge_aware": True}},
}


def pool_world() -> World:
    rank, size = dist.get_rank(), dist.get_world_size()
    return World(rank, size, rank, size, "127.0.0.1", 0, "environment")


def train(config: RunConfig, resume: str | None = None) -> TrainingRun:
    inputs = gather_inputs(config, resume, pool_world(), torch.device("cpu"))
    return execute_run(inputs, StopSignal())


def train_only(config: RunConfig) -> None:
    """A run whose parts stay where it was: they cannot be sent to the test."""
    train(config)


def train_losses(config: RunConfig, resume: str | None = None) -> list[float]:
    """The loss of every step of the run so far."""
    train(config, resume)
    return [record.loss for record in read_history(Path(config.output_dir))]


def adapter_digest(output_dir: str | Path) -> str:
    """SHA-256 of the newest checkpoint's adapter file."""
    return hashlib.sha256((list_checkpoints(Path(output_dir))[-1] / ADAPTER_MODEL).read_bytes()).hexdigest()
