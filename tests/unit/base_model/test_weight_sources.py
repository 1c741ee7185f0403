"""Safetensors folders read by parts, and files of a folder that are not what they should be."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dist_qft.base_model.sources import SafetensorsSource
from dist_qft.base_model.tokenizer import load_tokenizer
from dist_qft.base_model.weight_files import open_source
from dist_qft.config.schema import ModelConfig
from dist_qft.errors import CorruptFileError, UserError
from tests.support.tiny_model import save_tiny_model, tiny_llama_config

TENSORS = {
    "scalar": torch.tensor(3.5),
    "vector": torch.arange(7).bfloat16(),
    "matrix": torch.arange(35.0).view(5, 7),
    "stack": torch.arange(60).half().view(3, 4, 5),
    "codes": torch.arange(6, dtype=torch.uint8).view(2, 3),
    "empty": torch.empty(0, 4),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


@pytest.mark.parametrize("name", TENSORS)
def test_whole_tensors(folder, name):
    source = SafetensorsSource(folder)
    found = source.read(name)
    assert found.dtype == TENSORS[name].dtype
    assert torch.equal(found, TENSORS[name])
    assert source.shape(name) == tuple(TENSORS[name].shape)
    assert source.is_float(name) == (name != "codes")


@pytest.mark.parametrize(
    ("name", "box"),
    [
        ("vector", ((2, 5),)),
        ("matrix", ((1, 4),)),
        ("matrix", ((1, 4), (2, 3))),
        ("stack", ((1, 3),)),
        ("stack", ((0, 2), (1, 3))),
        ("stack", ((1, 2), (0, 4), (2, 5))),
        ("stack", ((2, 2), (0, 4), (0, 5))),
    ],
)
def test_boxes(folder, name, box):
    expected = TENSORS[name][tuple(slice(*span) for span in box)]
    assert torch.equal(SafetensorsSource(folder).read_box(name, box), expected)


@pytest.fixture
def without_single(folder: Path) -> Path:
    """A folder whose tensors lie in a file that only an index can name."""
    (folder / "model.safetensors").rename(folder / "model-00001.safetensors")
    return folder


def test_an_index_beside_the_single_file_is_not_looked_at(folder):
    """As in transformers (`_get_resolved_checkpoint_files`)."""
    model = save_tiny_model(folder / "model", tiny_llama_config(num_hidden_layers=1))
    tensors = load_file(model / "model.safetensors")
    other = {name: tensor * 0 for name, tensor in tensors.items()}
    save_file(other, model / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    theirs = AutoModelForCausalLM.from_pretrained(model).state_dict()
    source = open_source(ModelConfig(path=str(model)))
    for name in tensors:
        assert torch.equal(source.read(name), tensors[name]) and torch.equal(theirs[name], tensors[name])


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"weight_map": 7}', '{"weight_map": null}', '{"weight_map": {"a": null}}', "[" * 5000]
)
def test_an_index_that_is_none(without_single, text):
    (without_single / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CorruptFileError, match="not a safetensors index"):
        SafetensorsSource(without_single)


@pytest.mark.parametrize("name", ["x" * 5000, "model-00002.safetensors"])
def test_an_index_that_names_a_file_that_is_not_there(without_single, name):
    (without_single / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError) as raised:
        SafetensorsSource(without_single)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("name", ["../model.safetensors", "a\0b", "sub/model.safetensors"])
def test_an_index_that_leaves_the_folder(without_single, name):
    (without_single / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CorruptFileError, match="leaves the folder"):
        SafetensorsSource(without_single)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "model.gguf"])
def test_pointers_of_git_lfs_are_named(tmp_path, name):
    save_tiny_model(tmp_path)
    pointer = tmp_path / name
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    model = ModelConfig(path=str(pointer if pointer.suffix == ".gguf" else tmp_path))
    with pytest.raises(UserError) as raised:
        load_tokenizer(model) if name == "tokenizer.json" else open_source(model)
    assert (
        str(raised.value) == f"model.path: {pointer} is a Git LFS pointer, must be the file; run `git lfs pull` there"
    )
    assert raised.value.exit_code == 2
