"""The form of refusals, for a table of bad inputs: the key first, the value that was given, the remedy, exit code 2.

Two forms: `key: got X, must be Y`, and for a setting that cannot be used beside another one `key: reason; remedy`.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_qft.base_model.model_config import read_model_config
from dist_qft.config.check import accumulation_steps
from dist_qft.config.data_schema import DatasetConfig
from dist_qft.config.load import change_config
from dist_qft.config.schema import ModelConfig, RunConfig
from dist_qft.data.holding_out import held_out_indices
from dist_qft.data.sources import Source, open_data_source
from dist_qft.errors import UserError
from dist_qft.merge.targets import checked_request
from dist_qft.sharding.engines import make_engine
from dist_qft.sharding.shard_group import ranks_in_group
from dist_qft.tuned_model.answer import Sampling

GOT = r"(?:got .+|missing), must .+"
REMEDY = r".+; (?:remove|set|use|choose|give) .+"
TRAIN = {"data": {"train": {"path": "a.jsonl"}}}

# (changes of a valid config, key of the refusal, value that it names or "")
CONFIGS: list[tuple[dict[str, Any], str, str]] = [
    ({"train.seed": "one"}, "train.seed", "one"),
    ({"train.learning_rate": -1.0}, "train.learning_rate", "-1"),
    ({"sharding.engine": "ddp"}, "sharding.engine", "ddp"),
    ({"quantization.linear": "nf5"}, "quantization.linear", "nf5"),
    ({"method.name": "lora"}, "method.name", "lora"),
    ({"output_dir": ""}, "output_dir", ""),
    ({"data": {"train": {}}}, "data.train.path", "missing"),
    ({"model.path": "a.gguf", "model.revision": "main"}, "model.revision", ""),
    ({"quantization.block": [1, 32]}, "quantization.block", "[1, 32]"),
    ({"quantization.linear": "dense", "quantization.block": [64]}, "quantization.block", "dense"),
    ({"quantization.constants": "float32"}, "quantization.constants", "auto"),
    ({"quantization.linear": "affine4", "quantization.double_quant": True}, "quantization.double_quant", "affine4"),
    ({"quantization.linear": "dense", "quantization.exempt": ["experts"]}, "quantization.exempt", ""),
    ({"task": {"name": "classification", "labels": ["a"]}}, "task.labels", "1"),
    ({"task": {"name": "classification", "labels": ["a", "b", "a"]}}, "task.labels", "'a'"),
    ({"task": {"labels": ["a", "b"]}}, "task.labels", "causal-lm"),
    ({"task": {"name": "regression"}, **TRAIN, "data.packing": True}, "data.packing", "regression"),
    ({"task": {"name": "regression"}, **TRAIN, "data.train.format": "text"}, "data.train.format", "text"),
    ({"data": {"train": {"path": "a.jsonl", "weight": 1.0}}}, "data.train.weight", ""),
    ({**TRAIN, "data.eval": {"path": "b"}, "data.eval_samples": 5}, "data.eval_samples", ""),
    ({**TRAIN, "data.date": "yesterday"}, "data.date", "yesterday"),
    ({**TRAIN, "data.max_bad_rows": 0.5}, "data.max_bad_rows", ""),
    ({"train.global_batch_size": 16, "train.per_device_train_batch_size": 6}, "train.global_batch_size", "16"),
    ({"train.max_steps": 10, "train.warmup_steps": 10}, "train.warmup_steps", "10"),
    ({"train.lr_scheduler_type": "constant", "train.min_lr_ratio": 0.1}, "train.min_lr_ratio", "constant"),
    ({"train.lr_scheduler_type": "cosine_with_min_lr"}, "train.min_lr_ratio", "missing"),
    ({"train.decay_ratio": 0.5}, "train.decay_ratio", ""),
    ({"train.optim": "paged_adamw_8bit", "sharding.device": "cpu"}, "train.optim", "paged_adamw_8bit"),
    ({"sharding.engine": "zero", "sharding.offload": True, "sharding.device": "cpu"}, "sharding.offload", ""),
    ({"evaluation.eval_steps": 5}, "evaluation.eval_steps", ""),
    ({"evaluation.metric": "f1"}, "evaluation.metric", "f1"),
    ({"evaluation.early_stopping_threshold": 0.1}, "evaluation.early_stopping_threshold", ""),
    ({"checkpoint.keep_best": True}, "checkpoint.keep_best", ""),
    ({"checkpoint.load_best_at_end": True}, "checkpoint.load_best_at_end", ""),
    ({"merge.overwrite": True}, "merge.overwrite", ""),
    ({"merge.at_end": "gguf", "merge.dtype": "float32"}, "merge.dtype", "gguf"),
    ({"method": {"name": "qst"}, "train.gradient_checkpointing": True}, "train.gradient_checkpointing", "qst"),
    ({"method": {"name": "qahira", "merge_aware": True}, "quantization.linear": "nf4"}, "method.merge_aware", "nf4"),
    ({"method.schedule": [{"rank": 4, "depth": [2, 1]}]}, "method.schedule.0.depth", "[2, 1]"),
    ({"method.schedule": [{"layers": "mlp"}]}, "method.schedule.0", ""),
]  # fmt: skip

# key of the refusal, value, call
CALLS: list[tuple[str, str, Callable[[Path], object]]] = [
    ("model.path", "nothing.gguf", lambda path: read_model_config(ModelConfig(path=str(path / "nothing.gguf")))),
    ("model.path", "no/such/folder", lambda path: read_model_config(ModelConfig(path="no/such/folder"))),
    ("data.train.path", "a.jsonl", lambda path: opened("data.train", path=str(path / "a.jsonl"))),
    ("data.eval.split", "test", lambda path: opened("data.eval", path="stdlib-docs", split="test")),
    ("data.eval_samples", "60", lambda path: held_out_indices(60, 60)),
    ("train.global_batch_size", "16", lambda path: accumulation_steps(valid(), 3)),
    ("sharding.group", "3", lambda path: ranks_in_group(3, 4, 4)),
    ("sharding.engine", "ddp", lambda path: make_engine("ddp")),
    ("--to", "exe", lambda path: checked_request("exe", None, path, overwrite=False, requantize=None, dtype="float32")),
    ("--dtype", "f8", lambda path: checked_request("dense", None, path, overwrite=False, requantize=None, dtype="f8")),
    ("temperature", "-1", lambda path: Sampling(temperature=-1.0)),
]  # fmt: skip
# Nothing can be given in place of a file that is not there.
ABSENT = r".*(?:no file|no such file).*"


def opened(key: str, **dataset: str) -> Source:
    return open_data_source(DatasetConfig(**dataset), key)


def valid() -> RunConfig:
    return RunConfig.model_validate({"output_dir": "runs/a", "model": {"path": "folder"}})


@pytest.mark.parametrize(
    ("changes", "key", "value"), CONFIGS, ids=[f"{key} {n}" for n, (_, key, _) in enumerate(CONFIGS)]
)
def test_refusals_of_a_config(changes: dict[str, Any], key: str, value: str) -> None:
    with pytest.raises(UserError) as refused:
        change_config(valid(), changes)
    (line,) = [line for line in str(refused.value).splitlines() if line.startswith(f"{key}: ")]
    message = line.removeprefix(f"{key}: ")
    assert re.fullmatch(f"{GOT}|{REMEDY}", message), message
    assert value in message
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(("key", "value", "call"), CALLS, ids=[f"{n} {c[0]}" for n, c in enumerate(CALLS)])
def test_refusals_of_data_model_and_ranks(tmp_path: Path, key: str, value: str, call: Callable[[Path], object]) -> None:
    with pytest.raises(UserError) as refused:
        call(tmp_path)
    (line,) = str(refused.value).splitlines()
    assert line.startswith(f"{key}: ") and value in line
    assert re.fullmatch(f"{GOT}|{REMEDY}|{ABSENT}", line.removeprefix(f"{key}: ")), line
    assert refused.value.exit_code == 2
