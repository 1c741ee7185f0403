"""Whole training runs with a side network: engines and worlds agree, resume is exact, the base stays what it was."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from dist_qft.base_model.skeleton import build_skeleton
from dist_qft.config.schema import RunConfig
from dist_qft.data.batches import eval_batches
from dist_qft.errors import UserError
from dist_qft.plan import make_plan
from dist_qft.ranks.device import compute_dtype
from dist_qft.sharding.engine import parameter_owners
from dist_qft.storage.checkpoint import list_checkpoints
from dist_qft.tuned_model.assemble import assemble
from dist_qft.tuned_model.checkpointed import config_of, find_checkpoint, open_checkpointed
from dist_qft.tuned_model.held_out import held_out_loss
from tests.support.qst_models import qst_config
from tests.support.rank_pool import RankPool
from tests.support.tiny_model import tiny_config
from tests.support.whole_runs import adapter_digest, train, train_losses


@pytest.fixture(scope="module")
def reference(pools: dict[int, RankPool], tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses on one rank with the whole base, in one micro-batch per step."""
    config = qst_config(
        tiny_llama,
        tmp_path_factory.mktemp("reference") / "run",
        sharding={"engine": "replicated", "device": "cpu"},
        train={"per_device_train_batch_size": 8},
    )
    return pools[1].run(train_losses, config=config)[0]


@pytest.mark.parametrize(
    ("world", "engine", "micro"), [(2, "fsdp", 2), (4, "fsdp", 1), (2, "replicated", 4), (2, "zero", 2), (4, "zero", 1)]
)
def test_losses_equal_the_reference(pools, reference, tiny_llama, tmp_path, world, engine, micro):
    config = qst_config(
        tiny_llama,
        tmp_path / "run",
        sharding={"engine": engine, "device": "cpu"},
        train={"per_device_train_batch_size": micro},
    )
    results = pools[world].run(train_losses, config=config)
    assert all(result == results[0] for result in results), "ranks report different losses"
    assert results[0] == pytest.approx(reference, rel=1e-4)
    assert results[0][-1] < results[0][0]


def base_digest(parts) -> str:
    """SHA-256 over this rank's packed bytes of the base."""
    digest = hashlib.sha256()
    for module, name in parameter_owners(parts.base.units):
        digest.update(parts.engine.local(getattr(module, name)).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def train_and_look(config: RunConfig) -> dict:
    run = train(config)
    device = torch.device("cpu")
    skeleton = build_skeleton(config.model, config.quantization, compute_dtype(config.train.precision, device))
    fresh = assemble(config, skeleton, run.inputs.spec, device)
    return {
        "base unchanged": base_digest(run.parts) == base_digest(fresh),
        "gathered": run.meter.gathered_bytes_per_step,
        "reduced": run.meter.reduced_bytes_per_step,
        "trainables": run.flat.count,
    }


@pytest.mark.parametrize("engine", ["fsdp", "zero"])
def test_a_step_gathers_the_base_once_and_leaves_it_as_it_was(pools, tiny_llama, tmp_path, engine):
    sharding = {"engine": engine, "device": "cpu"}
    config = qst_config(tiny_llama, tmp_path / "run", train={"max_steps": 3}, sharding=sharding)
    plan = make_plan(config, world_size=2)
    for result in pools[2].run(train_and_look, config=config):
        assert result["base unchanged"]
        assert result["gathered"] == plan.gather_bytes_per_step
        assert result["trainables"] == plan.trainable_parameters
        assert 0 <= result["reduced"] - plan.reduce_bytes_per_step < 256
    formats = {"linear": "nf4", "block": [64]}
    adapters = tiny_config(tiny_llama, tmp_path / "run", quantization=formats, sharding=sharding)
    assert plan.gather_bytes_per_step < 0.75 * make_plan(adapters, world_size=2).gather_bytes_per_step


def test_resume_is_exact(pools, tiny_llama, tmp_path):
    def config(name: str, steps: int) -> RunConfig:
        return qst_config(tiny_llama, tmp_path / name, train={"max_steps": steps})

    pools[2].run(train_losses, config=config("whole", 10))
    pools[2].run(train_losses, config=config("parts", 5))
    pools[2].run(train_losses, config=config("parts", 10), resume="auto")
    assert adapter_digest(tmp_path / "whole") == adapter_digest(tmp_path / "parts")


def losses_of(path: Path) -> tuple[float, float]:
    """Held-out loss of base and tuned model, as `eval` computes them."""
    checkpoint = find_checkpoint(path)
    config = config_of(checkpoint)
    parts, tokenizer = open_checkpointed(checkpoint, config, torch.device("cpu"))
    from dist_qft.data.prepare import prepare

    data = prepare(config.data, tokenizer, parts.base.vocab_size, Path(config.data.cache_dir))
    batches = eval_batches(data.eval, 2, torch.distributed.get_rank(), torch.distributed.get_world_size())
    with parts.trainables.disabled():
        base = held_out_loss(parts.base, batches, torch.device("cpu")).loss
    return base, held_out_loss(parts.base, batches, torch.device("cpu")).loss


def test_a_saved_side_network_opens_on_another_world(pools, tiny_llama, tmp_path):
    data = {"train": {"path": str(tmp_path / "data.jsonl")}, "eval_samples": 8, "max_length": 64}
    data["cache_dir"] = str(tmp_path / "cache")
    config = qst_config(tiny_llama, tmp_path / "run", data=data)
    pools[2].run(train_losses, config=config)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["tuned_eval_loss"] < summary["base_eval_loss"] - 0.05
    base, tuned = pools[1].run(losses_of, path=tmp_path / "run")[0]
    assert base == pytest.approx(summary["base_eval_loss"], rel=1e-5)
    assert tuned == pytest.approx(summary["tuned_eval_loss"], rel=1e-5)
    stored = json.loads((list_checkpoints(tmp_path / "run")[-1] / "adapter_config.json").read_text())
    assert stored["peft_type"] == "DIST_QFT_QST"
    assert stored["side_network"]["reduction"] == 4


def refusal(config: RunConfig) -> str:
    try:
        train(config, resume="auto")
    except UserError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"reduction": 2}, "the side network's reduction was 4, the config says 2"),
        ({"downsample": "linear", "downsample_rank": None}, "the side network's downsample was adapter"),
        ({"name": "qlora", **dict.fromkeys(["reduction", "downsample_rank"])}, "peft_type: got 'DIST_QFT_QST'"),
    ],
)
def test_resuming_as_something_else_is_refused(pools, tiny_llama, tmp_path, change, message):
    pools[1].run(train_losses, config=qst_config(tiny_llama, tmp_path / "run", train={"max_steps": 1}))
    config = qst_config(tiny_llama, tmp_path / "run", train={"max_steps": 2}, method=change)
    assert message in pools[1].run(refusal, config=config)[0]
