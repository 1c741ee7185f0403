"""A mixture of experts in 4 bits on real ranks: losses, bytes, fingerprint, and what readers of its merges see."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import dist_qft
from dist_qft.base_model.skeleton import build_skeleton
from dist_qft.config.schema import RunConfig
from dist_qft.errors import UserError
from dist_qft.merge.recipe import MergeRequest
from dist_qft.merge.run import make_recipe
from dist_qft.methods.specs import make_spec
from dist_qft.plan import make_plan
from dist_qft.training.training_run import TrainingRun
from tests.support.merges import merge_run
from tests.support.qst_models import METHOD
from tests.support.tiny_model import VOCABULARY, save_tiny_model, tiny_config
from tests.support.whole_runs import METHODS, train, train_losses

IDS = torch.tensor([[5, 40, 77, 120, 33, 9, 201, 60, 12, 300]])
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
MIXTURE = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64}
AFFINE4 = {"linear": "affine4", "block": [8, 4]}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Published names: one tensor for each expert and product."""
    config = Qwen3MoeConfig(**SIZES, **MIXTURE, vocab_size=VOCABULARY, initializer_range=0.1)
    return save_tiny_model(tmp_path_factory.mktemp("mixture"), config)


def shapes_in(folder: Path) -> dict[str, list[int]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def run_of(mixture: Path, folder: Path, engine: str, method: str = "qlora") -> RunConfig:
    sections = {**METHODS.get(method, {}), "sharding": {"engine": engine}}
    if method == "qst":
        sections = {**sections, "method": METHOD}
    else:
        sections["method"] = {**sections.get("method", {}), "targets": ["all", "experts"]}
    return tiny_config(mixture, folder / f"{engine}-{method}", **sections)


def measured(config: RunConfig) -> tuple[list[float], str, int]:
    """Losses, the base's fingerprint and the bytes of it that this rank holds."""
    losses = train_losses(config)
    run: TrainingRun = train(config.model_copy(update={"output_dir": f"{config.output_dir}-again"}))
    return losses, run.parts.base.fingerprint, run.parts.engine.resident_bytes()


def test_losses_bytes_and_fingerprint_on_any_world(pools, mixture, tmp_path):
    found = {
        (world, engine): pools[world].run(measured, config=run_of(mixture, tmp_path / str(world), engine))
        for world, engine in [(1, "replicated"), (2, "fsdp"), (2, "zero")]
    }
    (reference, fingerprint, whole), *_ = found[1, "replicated"]
    assert reference[-1] < reference[0]
    for (world, engine), results in found.items():
        plan = make_plan(run_of(mixture, tmp_path, engine), world).to_dict()
        for losses, own, held in results:
            assert losses == pytest.approx(reference, rel=1e-4)
            assert own == fingerprint
            assert held <= 1.02 * whole / world + 65536
        assert max(held for *_, held in results) == plan["base_bytes_per_rank"]


def test_qst_puts_dense_layers_beside_a_mixture(pools, mixture, tmp_path):
    alone, together = (
        pools[world].run(train_losses, config=run_of(mixture, tmp_path / str(world), engine, "qst"))[0]
        for world, engine in [(1, "replicated"), (2, "fsdp")]
    )
    assert together == pytest.approx(alone, rel=1e-4)
    assert alone[-1] < alone[0]
    run = run_of(mixture, tmp_path / "2", "fsdp", "qst")
    live = dist_qft.load(run.output_dir)
    assert live.logits(IDS).isfinite().all()
    assert (
        "method.name: the side layers beside this mixture of experts are dense"
        in make_plan(run, 2).to_dict()["warnings"]
    )
    pruned = run.model_copy(update={"method": run.method.model_copy(update={"init": "pruned"})})
    with pytest.raises(UserError, match=r"method.init: got 'pruned', must be random"):
        make_plan(pruned, 2)


@torch.no_grad()
def test_merges_hold_the_experts(pools, mixture, tmp_path):
    """The folded zeros of a merge-aware run are the live model's, so its quantized merge has the same logits."""
    run = run_of(mixture, tmp_path, "fsdp", "qahira, merge-aware")
    pools[2].run(train_losses, config=run)
    live = dist_qft.load(run.output_dir)
    expected = live.logits(IDS)
    for target in ("dense", "quantized"):
        pools[2].run(merge_run, source=Path(run.output_dir), target=target, path=tmp_path / target)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    torch.testing.assert_close(dense(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert shapes_in(tmp_path / "dense") == shapes_in(mixture), "the published names, one tensor for each expert"
    merged = dist_qft.load(tmp_path / "quantized")
    assert torch.equal(merged.logits(IDS), expected)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", dtype=torch.float32)
    torch.testing.assert_close(theirs(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    for path, experts in live.base.experts.items():
        same = {name: torch.equal(t, merged.base.experts[path].packed()[name]) for name, t in experts.packed().items()}
        assert same == {"codes": True, "scale": True, "zero": False}


def test_the_plan_counts_experts_and_leaves_the_router_alone(mixture, tmp_path):
    plan = make_plan(run_of(mixture, tmp_path, "fsdp"), 2).to_dict()
    attention, experts = 2 * (2 * 64 * 64 + 2 * 64 * 32), 2 * 4 * 3 * 64 * 64
    assert plan["base_formats"][0]["weights"] == attention + experts
    expected = {"q_proj", "k_proj", "v_proj", "o_proj", "experts.gate_up_proj", "experts.down_proj"}
    assert set(plan["trainable_parameters_by_layer_type"]) == expected
    assert plan["trainable_parameters_by_layer_type"]["experts.down_proj"] == 2 * 4 * 4 * (64 + 64)
    assert any(warning.startswith("512 weights") for warning in plan["warnings"])  # the routers
    assert not any("experts with" in warning for warning in plan["warnings"])
    attention_alone = tiny_config(mixture, tmp_path / "attention")
    assert any("experts with 80% of" in warning for warning in make_plan(attention_alone, 2).to_dict()["warnings"])


def test_a_lora_of_experts_is_refused_by_the_peft_target(mixture, tmp_path):
    run = run_of(mixture, tmp_path, "fsdp")
    skeleton = build_skeleton(run.model, run.quantization, torch.float32)
    request = MergeRequest("peft", tmp_path / "peft")
    with pytest.raises(UserError, match="gate_up_proj: adapters on experts are not written for PEFT"):
        make_recipe(request, run, skeleton, make_spec(run, skeleton).tiles)
