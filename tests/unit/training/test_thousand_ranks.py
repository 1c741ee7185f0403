"""A rank of 8 to 1024, run alone: the collectives and the memory of the real step are those that the plan says."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3TextConfig,
    GPTNeoXConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen3Config,
)

from dist_qft.config.load import change_config
from dist_qft.config.schema import RunConfig
from dist_qft.plan import make_plan, planned_base
from dist_qft.training.fixed_tree import FixedTree
from dist_qft.training.planned_reduction import PlannedReduction
from tests.support.fake_ranks import LiveBytes, one_of_many, planned_passing, rehearse
from tests.support.tiny_model import tiny_llama_config

NF4 = {"linear": "nf4", "block": [64], "double_quant": True}
METHODS: dict[str, dict[str, Any]] = {
    "qlora": {"method": {"name": "qlora", "rank": 8}, "quantization": NF4},
    "qahira": {
        "method": {"name": "qahira", "pool": 4, "repeat": 8, "rank": 4},
        "quantization": {"linear": "affine4", "block": [8, 4]},
    },
    "qst": {"method": {"name": "qst", "reduction": 4, "downsample_rank": 8}, "quantization": NF4},
}
# Method, engine, ranks, group, optimizer spread, sum of the gradients, tied tables: every two of the first five meet.
RUNS = [
    ("qlora", "fsdp", 1024, "world", True, "fast", True),
    ("qlora", "replicated", 128, "world", False, "fast", False),
    ("qlora", "zero", 8, 4, True, "invariant", False),
    ("qahira", "fsdp", 128, 4, False, "invariant", False),
    ("qahira", "zero", 1024, "node", False, "fast", True),
    ("qahira", "replicated", 8, "world", True, "fast", False),
    ("qst", "fsdp", 8, "node", True, "fast", True),
    ("qst", "zero", 128, "world", True, "fast", False),
    ("qst", "replicated", 1024, "world", False, "invariant", False),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[bool, Path]:
    """Models that are a config.json alone, by whether their tables are tied."""
    found = {tied: tmp_path_factory.mktemp(f"tied-{tied}") for tied in (True, False)}
    for tied, folder in found.items():
        tiny_llama_config(num_hidden_layers=2, tie_word_embeddings=tied).save_pretrained(folder)
    return found


def test_the_runs_are_pairwise():
    assert {run[:2] for run in RUNS} == set(product(METHODS, ("fsdp", "zero", "replicated")))
    assert {run[0::2][:2] for run in RUNS} == set(product(METHODS, (8, 128, 1024)))
    assert {run[1:3] for run in RUNS} == set(product(("fsdp", "zero", "replicated"), (8, 128, 1024)))


@pytest.mark.parametrize(("method", "engine", "ranks", "group", "spread", "gradient_sum", "tied"), RUNS)
def test_one_rank_moves_and_holds_what_the_plan_says(folders, method, engine, ranks, group, spread, gradient_sum, tied):
    config = RunConfig.model_validate(
        {
            "output_dir": "unused",
            "model": {"path": str(folders[tied])},
            "data": {"train": {"path": "unused"}, "max_length": 16},
            "sharding": {"engine": engine, "device": "cpu", "group": group, "gradient_sum": gradient_sum},
            "train": {"max_steps": 9, "global_batch_size": 2 * ranks, "shard_optimizer": spread},
            **METHODS[method],
        }
    )
    base = planned_base(config)
    plan = make_plan(config, ranks, min(ranks, 8), base=base)
    found = rehearse(config, base, ranks, fake=method == "qst" and engine == "fsdp")
    assert found.received == [plan.gather_bytes_per_micro_batch] * 2
    assert sum(size for _, _, size in found.step) == sum(plan.collective_bytes_per_step.values())
    assert found.memory == {part: plan.memory[part] for part in found.memory}


# Method, engine, checkpointing, precision: the fullest time is in the head, or in a layer's backward pass.
PASSING = [
    ("qlora", "fsdp", True, "bfloat16"),
    ("qlora", "replicated", False, "float32"),
    ("qahira", "zero", True, "float32"),
    ("qahira", "replicated", False, "bfloat16"),
    ("qst", "zero", False, "bfloat16"),
    ("qst", "replicated", False, "float32"),
]


SHAPE = {"hidden_size": 1024, "num_hidden_layers": 3, "num_attention_heads": 16, "tie_word_embeddings": False}
SHAPE |= {"intermediate_size": 3072, "max_position_embeddings": 2048}


def passing(
    folder: Path, model: PretrainedConfig, method: str, engine: str, checkpointing: bool, precision: str, **changes: Any
):
    """Planned bytes of gathered weights, activations, workspace and the reduction, and those of the step."""
    model.save_pretrained(folder)
    train = {"max_steps": 1, "global_batch_size": 8, "precision": precision, "gradient_checkpointing": checkpointing}
    train |= changes.get("train", {})
    config = RunConfig.model_validate(
        {
            "output_dir": "unused",
            "model": {"path": str(folder)},
            "data": {"train": {"path": "unused"}, "max_length": 2048},
            "sharding": {"engine": engine, "device": "cpu", **changes.get("sharding", {})},
            "train": train,
            **METHODS[method],
        }
    )
    if "rank" in changes:
        config = change_config(config, {"method.rank": changes["rank"]})
    base = planned_base(config)
    planned = planned_passing(make_plan(config, 8, base=base))
    return planned, rehearse(config, base, 8, fake=True).passing


@pytest.mark.parametrize(("method", "engine", "checkpointing", "precision"), PASSING)
def test_what_passes_through_memory_is_the_plans(tmp_path, method, engine, checkpointing, precision):
    model = tiny_llama_config(**SHAPE, num_key_value_heads=4, vocab_size=32768)
    planned, found = passing(tmp_path, model, method, engine, checkpointing, precision)
    assert planned == pytest.approx(found, rel=0.05)


def test_what_the_reduction_holds_is_in_it(tmp_path):
    """Of many trainables: two copies of the gradient while backward runs; on CPUs, what other ranks have sent."""
    model = tiny_llama_config(**SHAPE, num_key_value_heads=4, vocab_size=4096)
    batch = {"train": {"global_batch_size": 32}}

    def of(**changes: Any) -> tuple[int, int]:
        return passing(tmp_path, model, "qlora", "replicated", True, "bfloat16", rank=512, **changes)

    (planned, found), summed = of(**batch), of(**batch, sharding={"gradient_sum": "invariant"})
    assert summed[0] - planned == pytest.approx(summed[1] - found, rel=0.01) and summed[0] > 2.5 * planned
    # The fewer activations are left, the more has been received: the plan counts the most of both.
    spread = of(train={"shard_optimizer": True}, sharding={"bucket_megabytes": 1})
    assert 0.5 * (spread[0] - planned) < spread[1] - found < spread[0] - planned


@pytest.mark.parametrize("spread", [True, False])
@pytest.mark.parametrize("accumulation", [1, 2, 3, 5, 6, 8])
def test_the_fixed_tree_holds_and_exchanges_what_the_plan_says(spread, accumulation):
    ranks, trainable = 4, 10_000
    config = RunConfig.model_validate(
        {
            "output_dir": "unused",
            "model": {"path": "unused"},
            "sharding": {"gradient_sum": "invariant"},
            "train": {"shard_optimizer": spread},
        }
    )
    planned = PlannedReduction(config, trainable, ranks, accumulation)
    values = planned.buffer_bytes // 4
    vector = torch.zeros(values + (1 if spread else planned.header_bytes // 4))
    held, exchanged = [], []
    for rank in range(ranks):
        with one_of_many(rank, ranks), LiveBytes() as live:
            tree = FixedTree(accumulation)
            for _ in range(accumulation - 1):
                tree.add(vector)
            held.append(live.peak)
            if spread:
                tree.reduce_scatter(vector, values // ranks, shared=1)
            else:
                tree.reduce(vector)
            exchanged.append(live.peak)
    assert max(held) == planned.held_bytes
    assert max(exchanged) == pytest.approx(max(planned.exchange_bytes, max(held)), rel=1e-3)


@pytest.mark.parametrize(
    "family",
    [Gemma3TextConfig, GPTNeoXConfig, Olmo2Config, OPTConfig, Phi3Config, Qwen3Config],
    ids=lambda of: of.__name__,
)
@pytest.mark.parametrize("checkpointing", [True, False])
def test_so_it_is_nearly_in_other_families(tmp_path, family, checkpointing):
    own = {OPTConfig: {"ffn_dim": 3072, "word_embed_proj_dim": 1024}, GPTNeoXConfig: {}}
    words = own.get(family, {"num_key_value_heads": 4})
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = family(**SHAPE, **words, **tokens, vocab_size=8192)
    planned, found = passing(tmp_path, model, "qlora", "replicated", checkpointing, "bfloat16")
    assert planned == pytest.approx(found, rel=0.12)
