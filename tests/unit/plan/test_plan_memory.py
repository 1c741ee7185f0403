"""The plan's memory by part, what would fit, the choice of `sharding.group: auto`, and the seconds of a step."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from dist_qft.config.load import load_config
from dist_qft.errors import UserError
from dist_qft.plan import make_plan, planned_base, require_fit
from dist_qft.training.machine import find_machine
from dist_qft.training.model_sizes import ModelSizes
from dist_qft.training.planned_activations import kept_activations
from dist_qft.training.run_plan import RunPlan
from dist_qft.training.step_time import StepWork, step_seconds
from tests.support.families import FAMILIES

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


def test_memory_by_part_and_what_would_fit(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    path = tmp_path / "run.yaml"
    path.write_text(
        f"output_dir: {tmp_path}/out\nmodel: {{path: {tmp_path}}}\ndata: {{train: {{path: stdlib-docs}}}}\n"
    )

    def of(limit: float, *overrides: str, world_size: int = 8) -> RunPlan:
        base = ["sharding.device=cuda", "data.max_length=2048", "method.rank=64", "train.shard_optimizer=true"]
        config = load_config(path, [*base, *overrides])
        return make_plan(config, world_size, 8, memory=int(limit * 2**30))

    plan = of(80)
    assert plan.fits and plan.remedy is None and plan.peak_bytes == sum(plan.memory.values())
    exact = {"trainables": 4, "gradients": 4, "moments": 1}  # 8 bytes of moments over 8 ranks
    assert {part: plan.memory[part] / plan.trainable_parameters for part in exact} == pytest.approx(exact, rel=1e-4)
    casts = [
        plan.memory["casts"],
        of(80, "train.precision=float32").memory["casts"],
        of(80, "method={name: qst}").memory,
    ]
    assert casts[:2] == [2 * plan.trainable_parameters, 0] and casts[2]["casts"] == 0
    assert plan.memory["base"] == plan.base_bytes_per_rank
    assert plan.load_peak_bytes == plan.memory["base"] + plan.memory["runtime"] < plan.peak_bytes
    checkpointed = of(80, "train.gradient_checkpointing=true")
    assert checkpointed.memory["activations"] < 0.35 * plan.memory["activations"]
    # With dropout a layer's inputs are kept as they were dropped; without it some of them are made again.
    drop = "method.dropout=0.1"
    dropping = of(80, drop).memory["activations"]
    assert checkpointed.memory["activations"] < dropping / 3
    tight = of(2.7, drop)
    assert (tight.fits, tight.remedy) == (False, "train.gradient_checkpointing=true")
    assert of(2.7, drop, tight.remedy).fits
    assert of(0.5).remedy is None
    with pytest.raises(UserError, match=r"^memory: got 2\.70 GiB per rank, must be .* would fit with train\.gradient"):
        require_fit(tight)
    # The fewest ranks that fit, nodes first; `fits` and the base belong to that choice.
    auto = [
        of(limit, "sharding.group=auto", "train.gradient_checkpointing=true", world_size=16) for limit in (80, 2.1, 1)
    ]
    assert [plan.shard_group for plan in auto] == [1, 4, 16]
    assert [plan.fits for plan in auto] == [True, True, False] and auto[1].peak_bytes < 2.1 * 2**30


def test_a_remedy_is_a_config_that_is_accepted_and_fits(tmp_path):
    """Each setting that costs memory can be taken back, alone or with others; none that a rule refuses is proposed."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    path = tmp_path / "run.yaml"
    path.write_text(
        f"output_dir: {tmp_path}/out\nmodel: {{path: {tmp_path}}}\ndata: {{train: {{path: stdlib-docs}}}}\n"
    )

    def of(limit: float, words: str, world_size: int) -> RunPlan:
        given = ["sharding.device=cuda", "data.max_length=2048", "train.global_batch_size=64", *words.split()]
        return make_plan(load_config(path, given), world_size, memory=int(limit * 2**30))

    again = "train.gradient_checkpointing=true"
    spread = "train.shard_optimizer=true"
    for words, world_size, limit, remedy in [
        (f"sharding.reshard_after_forward=false {spread} {again}", 8, 2.05, "sharding.reshard_after_forward=true"),
        ("sharding.reshard_after_forward=false", 1, 3.2, again),  # the other one is not needed
        (f"train.checkpoint_every_n_layers=4 {again}", 8, 2.5, "train.checkpoint_every_n_layers=1"),
        (f"sharding.engine=zero {again}", 1, 2.2, "sharding.offload=true"),
        (f"sharding.engine=zero sharding.prefetch_megabytes=900 {again}", 8, 2.4, "sharding.prefetch_megabytes=0"),
        (f"task.name=kto train.per_device_train_batch_size=8 {again}", 8, 6, "train.per_device_train_batch_size=2"),
        (f"sharding.engine=zero sharding.offload=true {again}", 1, 1.87, "train.offload_activations=true"),
        (f"sharding.engine=replicated {spread}", 8, 2.2, f"{again} sharding.engine=fsdp sharding.group=8"),
    ]:
        plan = of(limit, words, world_size)
        assert (plan.fits, plan.remedy) == (False, remedy), (words, plan.peak_bytes / 2**30)
        assert of(limit, f"{words} {remedy}", world_size).fits
    # Sharded over host memory, the base is not on the GPU, also while it is loaded.
    plan = of(80, "sharding.engine=zero sharding.offload=true", 1)
    assert (plan.memory["base"], plan.load_peak_bytes) == (0, plan.memory["runtime"])
    assert plan.base_bytes_per_rank == plan.base_bytes


def test_what_a_micro_batch_keeps(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    path = tmp_path / "run.yaml"
    path.write_text(
        f"output_dir: {tmp_path}/out\nmodel: {{path: {tmp_path}}}\ndata: {{train: {{path: stdlib-docs}}}}\n"
    )

    def at_head(*overrides: str, device: str = "cuda") -> int:
        words = [f"sharding.device={device}", "train.precision=bfloat16", "data.max_length=2048", *overrides]
        config = load_config(path, words)
        return kept_activations(config, ModelSizes.of(planned_base(config))).at_head

    # Four layers of 2,048 tokens in bfloat16: the input of each MLP's last matrix; a CPU makes those behind norms, too.
    drop, inner, norms = "method.dropout=0.1", 4 * 2048 * 11008 * 2, 4 * 2048 * 2 * 4096 * 2
    assert at_head(drop) - at_head() == inner
    assert at_head(drop, device="cpu") - at_head(device="cpu") == inner + norms
    # There, a norm keeps its input in float32: two of each layer, and the last.
    assert at_head(drop, device="cpu") - at_head(drop) == norms + norms // 8
    # An adapter that pools its inputs keeps fewer of them, and a side network none of the base's layers.
    pooling, side = (at_head(f"method={method}") for method in ("{name: qahira, pool: 32, repeat: 8}", "{name: qst}"))
    assert side < pooling / 3 < pooling < 0.8 * at_head(drop)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_eager_attention_keeps_its_scores(tmp_path, family, dtype):
    """As many bytes as autograd saves: also where scores have sinks or a cap."""
    tokens, heads = 256, 4
    config = FAMILIES[family]
    config.save_pretrained(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(
        f"output_dir: {tmp_path}/out\nmodel: {{path: {tmp_path}, attention: eager}}\nquantization: {{block: [32]}}\n"
        f"data: {{train: {{path: stdlib-docs}}, max_length: {tokens}}}\n"
        f"train: {{precision: {str(dtype).removeprefix('torch.')}}}\n"
    )

    def planned(*overrides: str) -> tuple[int, int]:
        run = load_config(path, ["sharding.device=cuda", *overrides])
        sizes = ModelSizes.of(planned_base(run))
        whole = kept_activations(run, sizes)
        without = kept_activations(run, replace(sizes, heads=0))
        return whole.at_head - without.at_head, whole.in_layer - without.in_layer

    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype).train()
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = model(torch.randint(0, 99, (1, tokens)), use_cache=False)  # noqa: F841  # holds what autograd saves
    scores = sum(size for size in saved.values() if size >= heads * tokens**2 * dtype.itemsize)
    assert planned() == pytest.approx((scores, scores), rel=0.01)
    again, in_layer = planned("train.gradient_checkpointing=true")
    assert (again, in_layer) == (0, pytest.approx(scores / config.num_hidden_layers, rel=0.01))


def test_options_about_gpus_plan_for_gpus_where_there_is_none(tmp_path, shell, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    path = tmp_path / "run.yaml"
    path.write_text(f"output_dir: {tmp_path}/out\nmodel: {{path: {tmp_path}}}\n")
    words = ("train.global_batch_size=8", "train.optim=paged_adamw_8bit", "--json")

    def told(*options: str) -> tuple[int, bool]:
        """The bytes of what is not the run's own, and a line that the plan is for CPUs."""
        plan = json.loads(shell("validate", path, *words, *options)[1])
        return plan["memory"]["runtime"], any("sharding.device=cuda plans for GPUs" in w for w in plan["warnings"])

    on_cpus, on_gpus = told(), (2**30, False)
    assert on_cpus[0] < on_gpus[0] and not on_cpus[1]
    for options in [("--gpus-per-node", "4"), ("--hardware", "H100"), ("--memory", "9GiB", "sharding.device=cuda")]:
        assert told(*options) == on_gpus
    for options in [("--memory", "80GiB"), ("--nodes", "2", "--world-size", "4")]:
        assert told(*options) == (on_cpus[0], True)
    assert told("--memory", "80GiB", "sharding.device=cpu", "train.optim=adamw") == on_cpus


def test_seconds_of_a_step_follow_from_the_machines_figures(tmp_path, shell):
    file = tmp_path / "slow.yaml"
    figures = "memory: 24GiB, memory_gb_per_s: 1000, inside_gb_per_s: 32"
    file.write_text(f"{{tflops: 100, {figures}, between_gb_per_s: 1, efficiency: 1.0}}\n")
    machine = find_machine(str(file))
    assert machine.memory == 24 * 2**30
    assert {find_machine(name).name for name in ("A100-80", "H100", "H200", "B200", "RTX-4090", "l40s")}
    sizes = ModelSizes(
        layers=1, hidden=0, active=10**9, weights=0, head=0, packed=0, layer_bytes=0, table_bytes=0, largest=0, saved=0,
        norms=0, norms_in_float32=True, norms_fusible=True, inputs=0, norm_inputs=0, inner_inputs=0,
        inner=0, gated=True, heads=0, attending=1, score_bytes=6, itemsize=2,
    )  # fmt: skip
    work = StepWork(
        tokens=1000, row=10, accumulation=2, trainable=0, backward=True, again=1.0, gathered=64 * 10**9,
        gathered_between=3 * 10**9, reduced_between=10**9, reduced=0, optimizer=10**12, ahead=True,
    )  # fmt: skip
    # 3 passes of 2 x 10^12 operations, twice; 3 GB from other nodes, twice, behind the computing of 0.12 s.
    found = step_seconds(machine, sizes, work)
    assert found == pytest.approx({"compute": 0.12, "gather": 6.0, "reduce": 1.0, "optimizer": 1.0, "step": 8.0})
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    run = tmp_path / "run.yaml"
    run.write_text(f"output_dir: {tmp_path}/out\nmodel: {{path: {tmp_path}}}\n")
    placed = ("--nodes", 2, "--gpus-per-node", 4, "train.global_batch_size=8", "--hardware")
    code, out, err = shell("validate", run, *placed, "H100", "--json")
    plan = json.loads(out)
    assert (code, err, plan["world_size"], plan["fits"], plan["hardware"]) == (0, "", 8, True, "H100")
    assert plan["seconds_per_step"]["step"] > 0
    assert shell("validate", run, *placed, file, "--memory", "1MiB")[0] == 2
    for words, message in [
        (("--hardware", "H1"), "--hardware: got 'H1', must be one of A100-80, H100"),
        (("--memory", "many"), "--memory: got 'many', must be a size such as 80GiB"),
        (("--memory", "80"), "--memory: got '80', must be a size such as 80GiB"),
        (("--nodes", 2, "--gpus-per-node", 4, "--world-size", 4), "--world-size: got 4, must be --nodes 2 x"),
        (("--hardware", run), "must have tflops, memory, memory_gb_per_s"),
    ]:
        code, _, err = shell("validate", run, *words)
        assert code == 2 and message in err
