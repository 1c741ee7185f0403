"""The central promise: neither engine, nor world size, nor accumulation changes what is learned."""

from itertools import product
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dist_qft.storage.checkpoint import ADAPTER_MODEL
from tests.support.rank_pool import RankPool
from tests.support.tiny_model import save_tiny_model, tiny_config, tiny_llama_config
from tests.support.whole_runs import METHODS, train_losses

# Method, ranks, engine, micro-batch. Each method under each engine (`replicated` is the reference), on 2 and 4 ranks;
# each engine on 2 and 4 ranks; 1, 2 and 4 micro-batches per step; not every combination of them.
LAYOUTS = [
    ("qlora", 2, "fsdp", 2),
    ("qlora", 4, "zero", 1),
    ("qbara", 4, "fsdp", 1),
    ("qbara", 2, "zero", 2),
    ("qbara", 2, "replicated", 4),
    ("qalora", 2, "fsdp", 4),
    ("qalora", 4, "zero", 2),
    ("qahira", 4, "fsdp", 2),
    ("qahira", 2, "zero", 1),
    ("qahira", 4, "replicated", 1),
    ("qablora", 4, "fsdp", 1),
    ("qablora", 2, "zero", 2),
    ("qahira, merge-aware", 2, "fsdp", 1),
    ("qahira, merge-aware", 4, "zero", 1),
]


@pytest.fixture(scope="module")
def reference(pools: dict[int, RankPool], tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory):
    """Losses of each method on one rank with the whole base, in one micro-batch per step."""
    losses = {}

    def get(method: str) -> list[float]:
        if method not in losses:
            folder = tmp_path_factory.mktemp("reference")
            losses[method] = _losses(pools[1], tiny_llama, folder, method, "replicated", 8)
        return losses[method]

    return get


def _losses(
    pool: RankPool, model: Path, folder: Path, method: str, engine: str, micro: int, **more: dict
) -> list[float]:
    sections = dict(METHODS[method])
    sections["sharding"] = {"engine": engine}
    sections["train"] = {"per_device_train_batch_size": micro, "max_steps": 6} | more
    results = pool.run(train_losses, config=tiny_config(model, folder / "run", **sections))
    assert all(result == results[0] for result in results), "ranks report different losses"
    return results[0]


def test_the_layouts_are_pairwise():
    assert {(method, engine) for method, _, engine, _ in LAYOUTS} >= set(product(METHODS, ("fsdp", "zero")))
    assert {(method, world) for method, world, _, _ in LAYOUTS} == set(product(METHODS, (2, 4)))
    assert {(world, engine) for _, world, engine, _ in LAYOUTS} == set(product((2, 4), ("fsdp", "zero", "replicated")))
    assert {micro for _, world, engine, micro in LAYOUTS if (world, engine) == (2, "fsdp")} == {1, 2, 4}


@pytest.mark.parametrize(("method", "world", "engine", "micro"), LAYOUTS)
def test_losses_equal_the_reference(pools, reference, tiny_llama, tmp_path, method, world, engine, micro):
    losses = _losses(pools[world], tiny_llama, tmp_path, method, engine, micro)
    assert losses == pytest.approx(reference(method), rel=1e-4)
    assert losses[-1] < losses[0]


def test_activation_checkpointing_does_not_change_the_losses(pools, reference, tiny_llama, tmp_path):
    every_second = {"gradient_checkpointing": True, "checkpoint_every_n_layers": 2}
    losses = _losses(pools[2], tiny_llama, tmp_path, "qahira", "fsdp", 2, **every_second)
    assert losses == pytest.approx(reference("qahira"), rel=1e-4)


@pytest.fixture(scope="module")
def tied_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose LM head is its embedding, as of most small models."""
    return save_tiny_model(tmp_path_factory.mktemp("tied-llama"), tiny_llama_config(tie_word_embeddings=True))


@pytest.mark.parametrize(
    ("method", "engine", "then"),
    [
        ("qahira", "fsdp", (1, "replicated", {})),  # tables of their own for input and output
        ("qlora", "zero", (2, "zero", {"gradient_checkpointing": True})),  # one table for both
    ],
)
def test_trained_tokens_learn_alike_and_resume(pools, tiny_llama, tied_llama, tmp_path, method, engine, then):
    model, names = {"qahira": tiny_llama, "qlora": tied_llama}[method], ["<|im_end|>", ":", 40]
    base = METHODS[method]

    def run(folder: str, world: int, engine: str, resume: str | None = None, tokens=names, **more) -> list[float]:
        train = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 2e-2, **more}
        sections = {**base, "method": {**base.get("method", {}), "train_tokens": tokens}}
        config = tiny_config(model, tmp_path / folder, **sections, train=train, sharding={"engine": engine})
        return pools[world].run(train_losses, config=config, resume=resume)[0]

    expected = run("one", 1, "replicated", per_device_train_batch_size=8)
    run("sharded", 2, engine, max_steps=2, shard_optimizer=True)
    world, second, more = then
    assert run("sharded", world, second, "auto", **more) == pytest.approx(expected, rel=1e-4)
    one, sharded = (load_file(tmp_path / name / "checkpoint-4" / ADAPTER_MODEL) for name in ("one", "sharded"))
    tables = [name for name in one if name.endswith("token_delta")]
    assert tables == ["lm_head.token_delta", "model.embed_tokens.token_delta"][0 if method == "qahira" else 1 :]
    for name in tables:
        assert (one[name] - sharded[name]).abs().max() < 1e-4 < one[name].abs().max()
        assert one[name].any(1).all() or name.startswith("model")  # of the input those that the data has
    with pytest.raises(AssertionError, match=r"method\.train_tokens: got \[2\], must be \[2, 28, 40\]"):
        run("one", 1, "replicated", "auto", names[:1])


@pytest.mark.parametrize(
    ("method", "world", "engine"),
    [("qahira, merge-aware", 1, "replicated"), ("qahira", 2, "fsdp"), ("qlora", 2, "zero")],
)
def test_activation_checkpointing_with_a_tied_head(pools, tied_llama, tmp_path, method, world, engine):
    plain, checkpointed = (
        _losses(pools[world], tied_llama, tmp_path / str(on), method, engine, 2, max_steps=4, gradient_checkpointing=on)
        for on in (False, True)
    )
    assert checkpointed == plain
