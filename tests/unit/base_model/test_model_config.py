"""A config.json that comes from elsewhere: no code of its folder runs, and what is malformed ends in one line."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch

from dist_qft.base_model.skeleton import build_skeleton
from dist_qft.base_model.tokenizer import load_tokenizer
from dist_qft.config.schema import ModelConfig, QuantizationConfig
from dist_qft.errors import UserError
from tests.support.tiny_model import tiny_llama_config

EVIL = """
from pathlib import Path
from transformers import LlamaConfig

Path({marker!r}).touch()


class MyConfig(LlamaConfig):
    model_type = "my_llama"
"""


def written(folder: Path, changes: dict | str) -> Path:
    folder.mkdir(exist_ok=True)
    tree = json.loads(tiny_llama_config().to_json_string(use_diff=False))
    text = changes if isinstance(changes, str) else json.dumps(tree | changes)
    (folder / "config.json").write_text(text)
    return folder


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as raised:
        build_skeleton(ModelConfig(path=str(folder)), QuantizationConfig(linear="dense"), torch.float32)
    text = str(raised.value)
    assert raised.value.exit_code == 2
    assert "\n" not in text
    assert len(text) < 600
    return text


@pytest.mark.parametrize("kind", ["my_llama", "llama"])
def test_code_of_the_folder_never_runs(tmp_path, monkeypatch, kind):
    """Neither for a model type that needs it, nor for one that does not; nobody is asked on the terminal."""
    marker = tmp_path / "ran"
    auto_map = {"AutoConfig": "my.MyConfig", "AutoModelForCausalLM": "my.MyModel", "AutoTokenizer": "my.MyTokenizer"}
    folder = written(tmp_path / "model", {"model_type": kind, "auto_map": auto_map, "tokenizer_class": "MyTokenizer"})
    (folder / "my.py").write_text(EVIL.format(marker=str(marker)))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["my.MyTokenizer", None]}}))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    model = ModelConfig(path=str(folder))
    if kind == "my_llama":
        text = refused(folder)
        assert "never run" in text
        assert "trust_remote_code" not in text
    else:
        build_skeleton(model, QuantizationConfig(linear="dense"), torch.float32)
    with pytest.raises(UserError):
        load_tokenizer(model)
    assert not marker.exists()
    assert sys.stdin.tell() == 0


@pytest.mark.parametrize("value", [0, -3, 2**31, 2**63, "three", 2.5, [3], {"a": 1}])
@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"])
def test_sizes_that_no_model_has(tmp_path, key, value):
    text = refused(written(tmp_path, {key: value}))
    if isinstance(value, int):
        assert f"config.json {key}: got {value}, must be 1 to " in text


def test_more_layers_than_can_be_built(tmp_path):
    assert "num_hidden_layers: got 1000000" in refused(written(tmp_path, {"num_hidden_layers": 10**6}))


@pytest.mark.parametrize(
    "changes",
    [
        {"intermediate_size": 0},
        {"intermediate_size": 2**40},
        {"num_key_value_heads": 0},
        {"num_key_value_heads": 3},
        {"num_key_value_heads": "2"},
        {"head_dim": 15},
        {"num_attention_heads": 7, "head_dim": None},
        {"initializer_range": 8.1, "hidden_size": 63},
        {"rope_parameters": {"rope_type": "nonsense", "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "yarn"}},
        {"rope_parameters": "default"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": "x"}},
        {"rms_norm_eps": "small"},
        {"hidden_act": "quetzal"},
        {"hidden_act": 3},
        {"attention_bias": "maybe"},
        {"model_type": 7},
        {"quantization_config": "yes"},
    ],
    ids=str,
)
def test_values_that_cannot_work(tmp_path, changes):
    assert refused(written(tmp_path, changes)).startswith("model.path: ")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"llama"', "[" * 3000, '{"a":' * 3000, "{}", "\udcff"], ids=repr
)
def test_files_that_are_no_configuration(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    assert refused(tmp_path).startswith("model.path: ")


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
def test_more_experts_than_can_be_built(tmp_path, key):
    kind = "qwen3_moe" if key == "num_experts" else "mixtral"
    assert key in refused(written(tmp_path, {"model_type": kind, key: 10**9}))
