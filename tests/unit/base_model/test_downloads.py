"""Models of a Hub: of all that a repository holds, the files are fetched that are read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.support.hub_server import HubServer, serving
from tests.support.tiny_model import save_tiny_model, tiny_llama_config

LLAMA = tiny_llama_config(num_hidden_layers=1)
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
SCRIPT = """
import sys
from dist_qft.base_model.weight_files import open_source
from dist_qft.config.schema import ModelConfig
from dist_qft.errors import DistQFTError
try:
    print(len(open_source(ModelConfig(path="owner/model")).names()))
except DistQFTError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""

BUILT = """
import sys, torch
from dist_qft.base_model.model_tensors import check_names
from dist_qft.base_model.skeleton import build_skeleton
from dist_qft.base_model.weight_files import open_source
from dist_qft.config.schema import ModelConfig, QuantizationConfig
from dist_qft.errors import DistQFTError
model = ModelConfig(path="owner/model")
base = build_skeleton(model, QuantizationConfig(linear="dense"), torch.float32)
try:
    tensors = check_names(base, open_source(model))
    print(base.tied, base.head_name in tensors)
except DistQFTError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with what else repositories hold: other copies of the weights, an adapter, other programs' files."""
    model = save_tiny_model(tmp_path / "model", LLAMA)
    content = (model / "model.safetensors").read_bytes()
    for name in ("original/model.safetensors", "consolidated.safetensors", "adapter_model.safetensors"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(content)
    (model / "original/params.json").write_text("{}")
    (model / "pytorch_model.bin").write_bytes(b"pickled")
    return model


def opened(server: HubServer, home: Path, script: str = SCRIPT, **environment: str) -> subprocess.CompletedProcess[str]:
    """A program that opens the model; by default it prints how many tensors there are."""
    own = {"HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", script]
    return subprocess.run(
        command, env={**os.environ, **own, **environment}, capture_output=True, text=True, timeout=300
    )


def weights(server: HubServer) -> list[str]:
    return sorted(name for name in server.fetched if not name.endswith(".json"))


def in_shards(folder: Path) -> None:
    """The same model as two files with an index; the second one holds no tensor."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / SHARDS[0])
    save_file({}, folder / SHARDS[1])
    index = {"weight_map": dict.fromkeys(tensors, SHARDS[0]) | {"none": SHARDS[1]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_the_single_file_and_no_other_copy(folder, tmp_path):
    with serving(folder, "owner/model") as server:
        result = opened(server, tmp_path / "home")
    assert result.returncode == 0, result.stderr
    assert weights(server) == ["model.safetensors"] and int(result.stdout) > 10
    assert "original/params.json" not in server.fetched and "No files matched" not in result.stderr


def test_the_files_of_an_index_and_then_offline(folder, tmp_path):
    in_shards(folder)
    with serving(folder, "owner/model") as server:
        result = opened(server, tmp_path / "home")
        assert (result.returncode, weights(server)) == (0, SHARDS), result.stderr
        server.fetched.clear()
        again = opened(server, tmp_path / "home", HF_HUB_OFFLINE="1")
    assert again.stdout == result.stdout and again.returncode == 0, again.stderr
    assert server.fetched == [] and "No files matched" not in result.stderr


def test_all_files_at_the_root_where_none_is_called_the_model(folder, tmp_path):
    in_shards(folder)
    for name in ("model.safetensors.index.json", "consolidated.safetensors", "adapter_model.safetensors"):
        (folder / name).unlink()
    with serving(folder, "owner/model") as server:
        result = opened(server, tmp_path / "home")
    assert (result.returncode, weights(server)) == (0, SHARDS), result.stderr


def test_what_cannot_be_read_is_refused_before_its_weights_are_fetched(folder, tmp_path):
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    with serving(folder, "owner/model") as server:
        result = opened(server, tmp_path / "home")
    assert result.returncode == 1 and "UserError: model.path" in result.stderr
    assert "only hf_quant_config.json says so" in result.stderr and weights(server) == []


def test_a_head_that_differs_though_the_configuration_ties_it(folder, tmp_path):
    """Seen when the files are there for the first time; from then on it counts, as in a local folder."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with serving(folder, "owner/model") as server:
        first = opened(server, tmp_path / "home", BUILT)
        again = opened(server, tmp_path / "home", BUILT)
    assert first.returncode == 1 and "UserError: " in first.stderr
    line = "config.json ties the LM head, but 'lm_head.weight' differs from 'model.embed_tokens.weight'"
    assert line in first.stderr and "start again" in first.stderr
    assert (again.returncode, again.stdout.split()) == (0, ["False", "True"]), again.stderr
    assert weights(server) == ["model.safetensors"]
