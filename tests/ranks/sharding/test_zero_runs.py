"""Whole runs under ZeRO-3: checkpoints cross the engines, and activation checkpointing changes nothing."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dist_qft.storage.checkpoint import list_checkpoints, read_checkpoint
from tests.support.tiny_model import tiny_config
from tests.support.whole_runs import adapter_digest, train, train_losses


def four_steps(model: Path, folder: Path, engine: str, resume: str | None = None) -> str:
    config = tiny_config(model, folder, sharding={"engine": engine}, checkpoint={"save_steps": 2})
    train(config, resume)
    return adapter_digest(folder)


def final_adapter(folder: Path) -> dict[str, Tensor]:
    return read_checkpoint(list_checkpoints(folder)[-1]).trainables


def test_a_checkpoint_of_each_engine_resumes_under_each_other(pools, tiny_llama, tmp_path):
    engines = ("zero", "fsdp", "replicated")
    straight = {}
    for engine in engines:
        digests = pools[2].run(four_steps, model=tiny_llama, folder=tmp_path / engine, engine=engine)
        straight[engine] = digests[0]
    for saved, other in [(a, b) for a in engines for b in engines if "zero" in (a, b)]:
        folder = tmp_path / f"{saved}-{other}"
        half = str(tmp_path / saved / "checkpoint-2")
        digest = pools[2].run(four_steps, model=tiny_llama, folder=folder, engine=other, resume=half)[0]
        if saved == other:
            assert digest == straight[saved]
        resumed, reference = final_adapter(folder), final_adapter(tmp_path / saved)
        for name, tensor in reference.items():
            torch.testing.assert_close(resumed[name], tensor, rtol=1e-4, atol=1e-6)


def test_activation_checkpointing_changes_no_loss(pools, tiny_llama, tmp_path):
    losses = []
    for name, checkpointing in (("plain", False), ("checkpointed", True)):
        sections = {"sharding": {"engine": "zero"}, "train": {"gradient_checkpointing": checkpointing}}
        losses.append(pools[2].run(train_losses, config=tiny_config(tiny_llama, tmp_path / name / "run", **sections)))
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-6)
