"""Rules of schedules, early stopping and LoRA+: each names the key that has no effect or is missing."""

import pytest

from dist_qft.config.load import load_config
from dist_qft.errors import UserError

EVAL = ["data={train: {path: a}, eval_samples: 4}", "evaluation.eval_steps=2"]


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["train.min_lr_ratio=0.1"], "train.min_lr_ratio"),
        (["train.lr_scheduler_type=cosine_with_min_lr"], "train.min_lr_ratio"),
        (["train.lr_scheduler_type=cosine", "train.decay_ratio=0.2"], "train.decay_ratio"),
        (["train.lr_scheduler_type=warmup_stable_decay", "train.decay_ratio=1.5"], "train.decay_ratio"),
        (["method.name=qahira", "train.loraplus_lr_ratio=16"], "train.loraplus_lr_ratio"),
        (["method.name=qst", "train.loraplus_lr_ratio=16"], "train.loraplus_lr_ratio"),
        (["evaluation.early_stopping_patience=2"], "evaluation.early_stopping_patience"),
        ([*EVAL, "evaluation.early_stopping_threshold=0.1"], "evaluation.early_stopping_threshold"),
        ([*EVAL, "evaluation.metric=accuracy", "checkpoint.keep_best=true"], "evaluation.metric"),
        ([*EVAL, "task={name: regression}", "evaluation.metric=pearson"], "evaluation.metric"),
    ],
)
def test_refused(tmp_path, overrides, key):
    path = tmp_path / "c.yaml"
    path.write_text("output_dir: o\nmodel: {path: m}\n")
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    assert all(key in line for line in str(caught.value).splitlines())


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.lr_scheduler_type=warmup_stable_decay", "train.decay_ratio=0.2", "train.min_lr_ratio=0.1"],
        ["train.lr_scheduler_type=cosine", "train.min_lr_ratio=0.1", "train.loraplus_lr_ratio=16"],
        [*EVAL, "evaluation.early_stopping_patience=3", "evaluation.early_stopping_threshold=0.01"],
        [*EVAL, "task={name: regression}", "evaluation.metric=pearson", "checkpoint.keep_best=true"],
    ],
)
def test_allowed(tmp_path, overrides):
    path = tmp_path / "c.yaml"
    path.write_text("output_dir: o\nmodel: {path: m}\n")
    load_config(path, overrides)
