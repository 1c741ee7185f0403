"""The plan of a run against numbers worked out by hand for a two-layer Llama, and the papers' counts for 7B."""

import json
from dataclasses import replace

import pytest

from dist_qft.config.load import load_config
from dist_qft.errors import UserError
from dist_qft.plan import make_plan
from dist_qft.training.plan_tables import print_plan
from dist_qft.training.run_plan import RunPlan

TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "tie_word_embeddings": False,
}
LLAMA_7B = {
    **TINY,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
# (rows, columns) of one tiny decoder layer: q, k, v, o, gate, up, down.
LINEARS = [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)]

NF4_BYTES = 2 * sum(rows * columns // 2 + rows * columns // 64 * 4 for rows, columns in LINEARS)
TABLE_BYTES = 96 * 64 + 96 * (64 // 32) * 2  # q8_0: one byte a weight, one fp16 scale for 32
NORM_BYTES = 5 * 64 * 4


@pytest.fixture
def make(tmp_path):
    """A function from overrides to the plan; the model's folder holds a config.json and nothing else."""

    def make_with(
        *overrides: str, world_size: int = 1, ranks_per_node: int | None = None, model: dict = TINY
    ) -> RunPlan:
        (tmp_path / "config.json").write_text(json.dumps(model))
        path = tmp_path / "run.yaml"
        path.write_text(f"output_dir: {tmp_path}/out\nmodel: {{path: {tmp_path}}}\nsharding: {{device: cpu}}\n")
        return make_plan(load_config(path, overrides), world_size, ranks_per_node)

    return make_with


@pytest.fixture
def plan(make):
    """The same, as its JSON form."""
    return lambda *overrides, **settings: make(*overrides, **settings).to_dict()


def test_base_bytes_and_blocks(plan):
    result = plan()
    assert result["base_bytes"] == NF4_BYTES + 2 * TABLE_BYTES + NORM_BYTES == 55808
    weights = 2 * sum(rows * columns for rows, columns in LINEARS)
    assert result["base_formats"] == [
        {
            "format": {"name": "nf4", "block": 64, "double_quant": False},
            "tensors": 14,
            "weights": weights,
            "blocks": weights // 64,
            "bytes": NF4_BYTES,
        },
        {
            "format": {"name": "q8_0"},
            "tensors": 2,
            "weights": 2 * 96 * 64,
            "blocks": 2 * 96 * 2,
            "bytes": 2 * TABLE_BYTES,
        },
        {"format": {"name": "norms, biases"}, "tensors": 5, "weights": 320, "blocks": 0, "bytes": NORM_BYTES},
    ]


@pytest.mark.parametrize(
    "quantization, block_weights",
    [("{linear: affine4, block: [8, 4]}", 32), ("{linear: nf4, double_quant: true}", 64), ("{linear: dense}", None)],
)
def test_blocks_and_bytes_add_up_in_every_format(plan, quantization, block_weights):
    result = plan(f"quantization={quantization}")
    weights = 2 * sum(rows * columns for rows, columns in LINEARS)
    rows = result["base_formats"]
    assert rows[0]["blocks"] == (weights // block_weights if block_weights else 0)
    assert result["base_bytes"] == sum(row["bytes"] for row in rows)


def test_bytes_per_rank_and_gathered(plan):
    """FSDP2 cuts dim 0 into parts of ceil(rows / N) rows and gathers with that padding."""

    def part(rows: int, row_bytes: int, world_size: int) -> int:
        return -(-rows // world_size) * row_bytes

    for world_size in (2, 3, 16):
        result = plan("train.global_batch_size=96", world_size=world_size)
        linears = 2 * sum(
            part(rows, columns // 2, world_size) + part(rows, columns // 64 * 4, world_size)
            for rows, columns in LINEARS
        )
        table = part(96, 64 + 4, world_size)
        rest = linears + 5 * part(64, 4, world_size)
        assert result["base_bytes_per_rank"] == 2 * table + rest
        # Forward: tables and layers; backward: layers. A rank receives all parts but its own.
        assert result["gather_bytes_per_micro_batch"] == (world_size - 1) * (2 * table + 2 * rest)
        accumulation = 96 // world_size
        assert result["gather_bytes_per_step"] == accumulation * result["gather_bytes_per_micro_batch"]


def test_what_the_engine_changes(plan):
    sharded = plan(world_size=2)
    kept = plan("sharding.reshard_after_forward=false", world_size=2)
    replicated = plan("sharding.engine=replicated", world_size=2)
    tied = plan(world_size=2, model={**TINY, "tie_word_embeddings": True})
    assert sharded["gather_bytes_per_micro_batch"] == TABLE_BYTES + NF4_BYTES + NORM_BYTES
    assert kept["gather_bytes_per_micro_batch"] == TABLE_BYTES + (NF4_BYTES + NORM_BYTES) // 2
    assert replicated["gather_bytes_per_micro_batch"] == 0
    assert replicated["base_bytes_per_rank"] == replicated["base_bytes"] == sharded["base_bytes"]
    # The tied table exists once and is gathered once, by either engine.
    tied_zero = plan("sharding.engine=zero", world_size=2, model={**TINY, "tie_word_embeddings": True})
    untied_zero = plan("sharding.engine=zero", world_size=2)
    assert tied["base_bytes"] == sharded["base_bytes"] - TABLE_BYTES
    assert tied["gather_bytes_per_micro_batch"] == sharded["gather_bytes_per_micro_batch"] - TABLE_BYTES // 2
    assert tied_zero["gather_bytes_per_micro_batch"] == untied_zero["gather_bytes_per_micro_batch"] - TABLE_BYTES // 2
    assert plan()["gather_bytes_per_micro_batch"] == 0


def test_trainables_optimizer_and_checkpoint(plan):
    result = plan("method.rank=4")
    per_layer = 4 * sum(rows + columns for rows, columns in LINEARS)
    assert result["trainable_parameters"] == 2 * per_layer == 8192
    assert result["trainable_parameters_by_depth"] == [per_layer, per_layer]
    assert result["trainable_parameters_by_layer_type"]["down_proj"] == 2 * 4 * (64 + 128)
    assert sum(result["trainable_parameters_by_layer_type"].values()) == 8192
    assert result["reduce_bytes_per_step"] == 4 * 8192
    assert (result["optimizer_bytes"], result["optimizer_ranks"]) == (8 * 8192, 1)
    spread = plan("method.rank=4", "train.shard_optimizer=true", world_size=2)
    assert (spread["optimizer_bytes"], spread["optimizer_ranks"]) == (8 * 4096, 2)
    assert result["checkpoint_bytes"] == 12 * 8192
    eight_bit = plan("method.rank=4", "train.optim=paged_adamw_8bit", "sharding.device=cuda")
    assert eight_bit["optimizer_bytes"] == 2 * (8192 + 8192 // 256 * 4)
    assert eight_bit["model"]["compute_dtype"] == "bfloat16"


def test_the_head_of_a_task_has_a_learning_rate_of_its_own(plan):
    group = "train.lr_groups=[{modules: [score], lr: 0.01}]"
    labelled = plan(group, "task={name: classification, labels: ['no', 'yes']}")
    assert labelled["trainable_parameters"] == plan()["trainable_parameters"] + 2 * 64
    with pytest.raises(UserError, match=r"^train.lr_groups.0.modules: got score, but no trainable is called so"):
        plan(group)


def test_schedule_shows_in_counts_and_rows(plan):
    result = plan("method={rank: 4, schedule: [{layers: mlp, depth: [1, 1], rank: 2}, {layers: k_proj, skip: true}]}")
    attention = 4 * (128 + 96 + 128)
    assert result["trainable_parameters_by_depth"] == [attention + 4 * 576, attention + 2 * 576]
    assert "k_proj" not in result["trainable_parameters_by_layer_type"]
    rows = [row for row in result["adapters"] if row["layer_type"] == "gate_proj"]
    assert [(row["layers"], row["max_rank"], row["scale"]) for row in rows] == [(1, 4, 4.0), (1, 2, 8.0)]


@pytest.mark.parametrize(
    "method, quantization, millions",
    [
        ("{name: qlora, rank: 64}", "{}", 159.9),
        ("{name: qbara, rank: 64, balance: 4}", "{}", 159.9),
        ("{name: qalora, rank: 64, pool: 32}", "{linear: affine4}", 89.3),
        ("{name: qahira, pool: 4, repeat: 8}", "{linear: affine4, block: [8, 4]}", 202.4),
    ],
)
def test_llama_7b_counts_of_the_papers(plan, method, quantization, millions):
    result = plan(f"method={method}", f"quantization={quantization}", model=LLAMA_7B)
    assert round(result["trainable_parameters"] / 1e6, 1) == millions
    assert result["warnings"] == []


@pytest.mark.parametrize(
    ("overrides", "obstacle"),
    [
        (["method={name: qahira, pool: 32, repeat: 8}", "quantization={linear: affine4, block: [8, 4]}"], None),
        (["method={name: qahira, pool: 32, repeat: 8}", "quantization={linear: affine4, block: [4, 2]}"], None),
        (["method.name=qalora", "quantization.linear=affine4"], None),
        (["method.name=qbara", "quantization.linear=affine4"], None),
        (["method.name=qalora"], "is nf4, which has no zeros to take dW"),
        (
            ["method={name: qahira, pool: 16, repeat: 4}", "quantization={linear: affine4, block: [8, 32]}"],
            "repeat 4 is not a multiple of 8 (nearest: 8 or 16); pool 16 is not a multiple of 32",
        ),
        (
            ["method={name: qalora, schedule: [{layers: mlp, pool: 16}]}", "quantization.linear=affine4"],
            "pool 16 is not a multiple of 32",
        ),
    ],
)
def test_adapters_that_will_not_merge_exactly_are_warned_of(plan, overrides, obstacle):
    warnings = plan(*overrides)["warnings"]
    assert len(warnings) == (obstacle is not None)
    assert obstacle is None or obstacle in warnings[0]


@pytest.mark.parametrize(
    "overrides, world_size, message",
    [
        (["train.global_batch_size=10"], 4, "train.global_batch_size: got 10, must be a multiple of 4"),
        (["method.targets=[q_prj]"], 1, "'q_prj' matches no layer"),
        (["method.name=qalora", "method.pool=48", "quantization.linear=affine4"], 1, "48 does not divide"),
        (["quantization.block=[128]"], 1, "nf4 block 128 does not divide in_features 64"),
    ],
)
def test_refusals(plan, overrides, world_size, message):
    with pytest.raises(UserError) as refusal:
        plan(*overrides, world_size=world_size)
    assert message in str(refusal.value)


def test_data_that_are_not_on_this_machine_are_warned_of(plan, tmp_path):
    (tmp_path / "there.jsonl").write_text('{"text": "one"}\n')
    files = [f"data.train.path={tmp_path}/there.jsonl", f"data.eval.path={tmp_path}/missing.jsonl"]
    [warning] = plan(*files)["warnings"]
    assert warning.startswith(f"data.eval.path: no such file or folder: {tmp_path}/missing.jsonl")
    assert plan("data.train.path=someone/a-set-of-the-hub")["warnings"] == []


def test_json_is_the_only_output_and_survives_the_trip(make, capsys):
    result = make("method.name=qalora", world_size=2)
    print_plan(result, as_json=True)
    output = capsys.readouterr()
    assert json.loads(output.out) == result.to_dict()
    assert output.err == ""


def test_tables_show_the_same_numbers(make, capsys):
    print_plan(make("method.name=qalora", "method.rank=4", "train.max_steps=7", world_size=2))
    text = capsys.readouterr().out
    for part in ("qalora", "2 x fsdp", "16 = 1 x 2 ranks x 8 accumulation", "7 steps", "nf4 block=64", "128 x 64"):
        assert part in text
    assert "warning: method.name: will not merge exactly" in text


def test_a_path_in_the_table_is_no_markup(make, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    plan = make()
    print_plan(replace(plan, model=replace(plan.model, path="/models/[v1] [/x] :memo:")))
    assert "/models/[v1] [/x] :memo:" in capsys.readouterr().out
