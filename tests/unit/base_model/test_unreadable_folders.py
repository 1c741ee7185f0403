"""Folders whose weights cannot be read: one line that says what they are, from `validate` and `train` alike."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from safetensors.torch import load_file, save_file

from dist_qft.base_model.model_tensors import check_names
from dist_qft.base_model.skeleton import build_skeleton
from dist_qft.base_model.weight_files import open_source
from dist_qft.config.schema import ModelConfig, QuantizationConfig
from dist_qft.errors import UserError
from tests.support.packed_folders import set_quantization
from tests.support.tiny_model import save_tiny_model, tiny_llama_config

LLAMA = tiny_llama_config(num_hidden_layers=1)
KEYS = "model.layers.0.self_attn.k_proj.weight"


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def index_alone(folder: Path) -> None:
    index = {"weight_map": {KEYS: "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def in_8_bits(folder: Path, dtype: torch.dtype) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[f"{name}_scale"] = torch.ones(len(tensors[name]), 1)
        tensors[name] = (tensors[name] * 100).to(dtype)
    save_file(tensors, folder / "model.safetensors")


def fp8(folder: Path) -> None:
    in_8_bits(folder, torch.float8_e4m3fn)


def modelopt_alone(folder: Path) -> None:
    fp8(folder)
    settings = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(settings))


def int8(folder: Path) -> None:
    in_8_bits(folder, torch.int8)
    weights = QuantizationArgs(num_bits=8, strategy="channel").model_dump(mode="json")
    groups = {"all": {"targets": ["Linear"], "weights": weights}}
    set_quantization(folder, {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": groups})


def nothing_quantized(folder: Path) -> None:
    set_quantization(folder, {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (pickled, "has no *.safetensors file (pickled .bin weights are not read)"),
        (index_alone, "names model-00001-of-00002.safetensors, which is not in the folder (1 missing)"),
        (
            modelopt_alone,
            "is quantized by ModelOpt (FP8), but only hf_quant_config.json says so; must be in config.json",
        ),
        (fp8, "holds F8_E4M3 without a quantization_config in config.json that says how, must be floats"),
        (int8, "is I8 (compressed-tensors int-quantized), which is not supported; must be 16-bit or 32-bit weights"),
        (nothing_quantized, "config.json promises quantized weights, but none is stored in it"),
    ],
)
def test_what_it_is_is_said(tmp_path, damage: Callable[[Path], None], words):
    model = ModelConfig(path=str(save_tiny_model(tmp_path, LLAMA)))
    damage(tmp_path)
    with pytest.raises(UserError) as raised:
        check_names(build_skeleton(model, QuantizationConfig(), torch.bfloat16), open_source(model))
    assert words in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("damage", [pickled, index_alone, modelopt_alone, int8])
def test_validate_finds_it_without_loading(tmp_path, damage):
    """The skeleton is what `validate` builds; it opens no source of floats itself."""
    model = ModelConfig(path=str(save_tiny_model(tmp_path, LLAMA)))
    damage(tmp_path)
    with pytest.raises(UserError) as early:
        build_skeleton(model, QuantizationConfig(), torch.bfloat16)
    with pytest.raises(UserError) as late:
        open_source(model)
    assert str(early.value) == str(late.value)


def test_a_configuration_alone_can_be_planned_with(tmp_path):
    LLAMA.save_pretrained(tmp_path)
    assert build_skeleton(ModelConfig(path=str(tmp_path)), QuantizationConfig(), torch.bfloat16).linears


def test_modelopt_that_says_so_twice_is_read(tmp_path):
    save_tiny_model(tmp_path, LLAMA)
    modelopt_alone(tmp_path)
    set_quantization(tmp_path, {"quant_method": "modelopt", "quant_algo": "FP8"})
    assert open_source(ModelConfig(path=str(tmp_path))).kind(KEYS) == "FP8 E4M3, a scale per output"
