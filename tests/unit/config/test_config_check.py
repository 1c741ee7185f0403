"""Rules between settings: refused or warned of, with the key and the remedy."""

import pytest

from dist_qft.config.check import accumulation_steps, config_warnings
from dist_qft.config.load import load_config
from dist_qft.config.schema import RunConfig
from dist_qft.errors import UserError
from dist_qft.sharding.engines import engine_warnings

BEST = ["data={train: {path: a}, eval_samples: 4}", "checkpoint.keep_best=true"]


@pytest.fixture
def load(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: runs/a\nmodel: {path: folder}\n")

    def load_with(*overrides: str) -> RunConfig:
        return load_config(path, overrides)

    return load_with


@pytest.mark.parametrize(
    "overrides, key, message",
    [
        (
            ["quantization.constants=float32"],
            "quantization.constants",
            "auto has no such choice; remove it or choose affine4",
        ),
        (["quantization.block=[1, 32]"], "quantization.block", "got [1, 32], must be one length such as [64] for nf4"),
        (
            ["quantization.linear=affine4", "quantization.block=[32]"],
            "quantization.block",
            "got [32], must be [b_out, b_in] such as [1, 32] for affine4",
        ),
        (
            ["quantization.linear=dense", "quantization.block=[64]"],
            "quantization.block",
            "dense has no blocks; remove it or choose nf4 or affine4",
        ),
        (
            ["quantization.linear=affine4", "quantization.double_quant=true"],
            "quantization.double_quant",
            "affine4 has no absmax to quantize; remove it or choose nf4",
        ),
        (
            ["quantization.linear=dense", "quantization.exempt=[q_proj]"],
            "quantization.exempt",
            "all linear layers are dense already; remove it",
        ),
        (
            ["method.pool=4"],
            "method.pool",
            "qlora does not use it; qlora has init_from, rank, alpha, dropout, targets, schedule",
        ),
        (
            ["method.name=qahira", "method.balance=2"],
            "method.balance",
            "qahira does not use it; qahira has init_from, rank, alpha, dropout, targets, schedule, train_tokens",
        ),
        (
            ["method.name=qalora", "method.repeat=2"],
            "method.repeat",
            "qalora does not use it; qalora has init_from, rank, alpha",
        ),
        (["method.pool_mode=sum"], "method.pool_mode", "qlora does not use it; qlora has"),
        (
            ["method.schedule=[{rank: 8}, {rank: 8, pool: 2}]"],
            "method.schedule.1.pool",
            "qlora does not use it; qlora has layers, depth, rank, alpha, skip",
        ),
        (
            ["method.schedule=[{rank: 8, depth: [4, 3]}]"],
            "method.schedule.0.depth",
            "got [4, 3], must be first <= last",
        ),
        (
            ["method.schedule=[{layers: mlp, depth: [0, 3]}]"],
            "method.schedule.0",
            "the rule sets nothing; give rank, alpha or skip",
        ),
        (
            ["method.schedule=[{skip: true, rank: 2}]"],
            "method.schedule.0",
            "skip leaves no use for rank; give one or the other",
        ),
        (
            ["train.per_device_train_batch_size=6"],
            "train.global_batch_size",
            "got 16, must be a multiple of train.per_device_train_batch_size 6: 12 or 18",
        ),
        (
            ["train.warmup_steps=10", "train.max_steps=10"],
            "train.warmup_steps",
            "got 10, must be less than train.max_steps 10, or the whole run is a warm-up",
        ),
        (
            ["train.optim=paged_adamw_32bit", "sharding.device=cpu"],
            "train.optim",
            "got paged_adamw_32bit, must be adamw with sharding.device cpu",
        ),
        (["evaluation.eval_steps=5"], "evaluation.eval_steps", "nothing to evaluate"),
        (["data.train.path=a", "evaluation.eval_steps=5"], "evaluation.eval_steps", "nothing to evaluate"),
        (
            ["data={train: {path: a}, eval: {path: b}, eval_samples: 5}"],
            "data.eval_samples",
            "no effect, data.eval is given; remove one of them",
        ),
        (
            ["method.reduction=8"],
            "method.reduction",
            "qlora does not use it; qlora has init_from, rank, alpha",
        ),
        (
            ["method.name=qst", "method.rank=8"],
            "method.rank",
            "qst does not use it; qst has init_from, reduction, downsample, downsample_rank, compat, init, cache",
        ),
        (
            ["method={name: qst, downsample: linear, downsample_rank: 8}"],
            "method.downsample_rank",
            "linear has no rank; remove it or use adapter or lora",
        ),
        (
            ["method.name=qst", "train.gradient_checkpointing=true"],
            "train.gradient_checkpointing",
            "qst keeps nothing of the base for backward; remove it",
        ),
        (
            ["train.checkpoint_every_n_layers=2"],
            "train.checkpoint_every_n_layers",
            "has no effect without train.gradient_checkpointing; set it to true",
        ),
        (["model.path=a.gguf", "model.revision=main"], "model.revision", "a GGUF file has no revisions; remove it"),
    ],
)
def test_refused(load, overrides, key, message):
    with pytest.raises(UserError) as refusal:
        load(*overrides)
    (line,) = str(refusal.value).splitlines()
    # An override that sets exactly this key names it already; otherwise the key stands before the message.
    assert f"{key}=" in line or f" {key}: " in line
    assert message in line
    assert refusal.value.exit_code == 2


def test_broken_rules_are_reported_together_with_their_lines(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "output_dir: a\nmodel: {path: b}\nmethod:\n  schedule: [{rank: 4, depth: [2, 1]}]\n"
        "evaluation:\n  eval_steps: 5\n"
        "quantization:\n  linear: affine4\n  double_quant: true\n"
    )
    with pytest.raises(UserError) as refusal:
        load_config(path)
    assert str(refusal.value).replace(str(path), "run.yaml").splitlines() == [
        "run.yaml:4: method.schedule.0.depth: got [2, 1], must be first <= last",
        "run.yaml:6: evaluation.eval_steps: nothing to evaluate; set data.eval or data.eval_samples",
        "run.yaml:9: quantization.double_quant: affine4 has no absmax to quantize; remove it or choose nf4",
    ]


def test_allowed_neighbours_of_the_refused(load):
    method = load("method.name=qbara", "method.pool_mode=sum", "method.balance=4").method
    assert (method.name, method.pool_mode, method.balance) == ("qbara", "sum", 4)
    first, second = load("method.schedule=[{layers: q_proj, skip: false}, {depth: [3, 3], rank: 1}]").method.schedule
    assert (first.skip, second.depth, second.rank) == (False, [3, 3], 1)
    assert load("data={train: {path: a}, eval_samples: 5}", "evaluation.eval_steps=5").evaluation.eval_steps == 5
    assert load("train.warmup_steps=9", "train.max_steps=10").train.warmup_steps == 9


@pytest.mark.parametrize(
    "overrides, expected",
    [
        ([], []),
        (
            ["train={max_steps: 9, num_train_epochs: 2, warmup_steps: 1, warmup_ratio: 0.1}"],
            [
                "train.num_train_epochs: no effect, train.max_steps is set",
                "train.warmup_ratio: no effect, train.warmup_steps is set",
            ],
        ),
        (
            ["sharding={engine: replicated, reshard_after_forward: false}"],
            ["sharding.reshard_after_forward: no effect with engine replicated"],
        ),
        (
            ["sharding={engine: replicated, group: node}", "sharding.bucket_megabytes=8"],
            ["sharding.group: no effect with engine replicated"],
        ),
        (["sharding={engine: fsdp, group: node}"], []),
        ([*BEST, "evaluation={eval_steps: 2, early_stopping_patience: 3}", "train.max_steps=9"], []),
        (
            [*BEST, "evaluation={eval_steps: 2, early_stopping_patience: 3}", "train.max_steps=8"],
            [
                "evaluation.early_stopping_patience: no effect in a run of 8 steps, which could stop at step 8 at the "
                "earliest (3 + 1 evaluations, one every 2)"
            ],
        ),
        (
            [*BEST, "evaluation.eval_steps=8", "train.max_steps=8"],
            ["checkpoint.keep_best: no effect in a run of 8 steps, whose first evaluation would be at step 8"],
        ),
        ([*BEST, "evaluation.eval_steps=8", "train.max_steps=9"], []),
        ([*BEST, "evaluation.eval_steps=8"], []),
        (
            ["sharding={engine: zero, prefetch_megabytes: 1, reshard_after_forward: false}"],
            ["sharding.reshard_after_forward: no effect with engine zero"],
        ),
    ],
)
def test_warnings(load, overrides, expected):
    config = load(*overrides)
    assert config_warnings(config) + engine_warnings(config) == expected


@pytest.mark.parametrize("world_size, micro, steps", [(1, 1, 48), (1, 48, 1), (2, 4, 6), (3, 4, 4), (16, 3, 1)])
def test_accumulation_steps(load, world_size, micro, steps):
    config = load("train.global_batch_size=48", f"train.per_device_train_batch_size={micro}")
    assert accumulation_steps(config, world_size) == steps


@pytest.mark.parametrize(
    "total, micro, world_size, message",
    [
        (
            16,
            2,
            3,
            "train.global_batch_size: got 16, must be a multiple of 6, train.per_device_train_batch_size 2 x 3 ranks; "
            "use train.global_batch_size 12 or 18, or 1, 2, 4 or 8 ranks",
        ),
        (
            24,
            4,
            4,
            "train.global_batch_size: got 24, must be a multiple of 16, train.per_device_train_batch_size 4 x 4 ranks; "
            "use train.global_batch_size 16 or 32, or train.per_device_train_batch_size 1, 2, 3 or 6, "
            "or 1, 2, 3 or 6 ranks",
        ),
        (
            8,
            1,
            16,
            "train.global_batch_size: got 8, must be a multiple of 16, train.per_device_train_batch_size 1 x 16 ranks; "
            "use train.global_batch_size 16, or 1, 2, 4 or 8 ranks",
        ),
    ],
)
def test_batch_that_does_not_divide_names_the_legal_sizes(load, total, micro, world_size, message):
    config = load(f"train.global_batch_size={total}", f"train.per_device_train_batch_size={micro}")
    with pytest.raises(UserError) as refusal:
        accumulation_steps(config, world_size)
    assert str(refusal.value) == message
