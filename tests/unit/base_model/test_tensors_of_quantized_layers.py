"""Tensors beside quantized weights that the model does not take: factors of inputs are refused, others left alone."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BloomConfig, PretrainedConfig, Starcoder2Config

from dist_qft.base_model.model_tensors import check_names
from dist_qft.base_model.skeleton import build_skeleton
from dist_qft.base_model.weight_files import open_source
from dist_qft.config.schema import ModelConfig, QuantizationConfig
from dist_qft.errors import UserError
from tests.support.packed_folders import awq, compressed, save_int4_folder, set_quantization
from tests.support.quantized_experts import COMPRESSED
from tests.support.tiny_model import VOCABULARY, save_tiny_model, tiny_llama_config

LLAMA = tiny_llama_config(num_hidden_layers=1)
STARCODER = Starcoder2Config(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCABULARY,
    bos_token_id=1,
    eos_token_id=2,
)
BLOOM = BloomConfig(hidden_size=64, n_layer=1, n_head=4, vocab_size=VOCABULARY)
DOWN = "model.layers.0.mlp.down_proj"


def notes_of(folder: Path) -> list[str]:
    """The lines that loading a folder would print about its tensors."""
    model = ModelConfig(path=str(folder), attention="eager")
    return check_names(build_skeleton(model, QuantizationConfig(), torch.bfloat16), open_source(model)).notes


def add(folder: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(load_file(folder / "model.safetensors") | tensors, folder / "model.safetensors")
    return folder


def save_awq(folder: Path, config: PretrainedConfig) -> Path:
    """All matrices of the layers, by AWQ's packing."""
    save_tiny_model(folder, config)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if (".layers." in name or ".h." in name) and tensors[name].dim() == 2]:
        rows, columns = tensors.pop(name).shape
        zeros, scales = torch.full((rows, columns // 32), 8), torch.full((rows, columns // 32), 0.01).half()
        parts = awq(torch.full((rows, columns), 7), zeros, scales, torch.arange(columns) // 32)
        tensors |= {name.removesuffix("weight") + key: part for key, part in parts.items()}
    save_file(tensors, folder / "model.safetensors")
    set_quantization(folder, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"})
    return folder


@pytest.mark.parametrize(
    ("config", "name"),
    [(STARCODER, "model.layers.0.mlp.act.scales"), (BLOOM, "transformer.h.0.mlp.gelu_impl.scales")],
    ids=["starcoder2", "bloom"],
)
def test_factors_of_activations_in_awq_are_refused(tmp_path, config, name):
    folder = save_awq(tmp_path, config)
    assert notes_of(folder) == []
    with pytest.raises(UserError) as raised:
        notes_of(add(folder, {name: torch.rand(128) + 0.5}))
    words = "not supported, as it may change what a quantized layer computes"
    assert str(raised.value) == f"{folder}: tensor '{name}': {words}"


@pytest.mark.parametrize("part", ["pre_quant_scale", "svdquant_lora_a", "input_quantizer.pre_quant_scale", "R_weight"])
def test_other_tensors_of_a_quantized_layer_are_refused(tmp_path, part):
    save_int4_folder(tmp_path, LLAMA, compressed, COMPRESSED, group=32, symmetric=True)
    with pytest.raises(UserError, match=f"tensor '{DOWN}.{part}': not supported"):
        notes_of(add(tmp_path, {f"{DOWN}.{part}": torch.ones(LLAMA.intermediate_size)}))


def test_pre_quant_scale_of_modelopt_is_refused(tmp_path):
    save_tiny_model(tmp_path, LLAMA)
    tensors = load_file(tmp_path / "model.safetensors")
    rows, columns = tensors.pop(f"{DOWN}.weight").shape
    tensors |= {
        f"{DOWN}.weight": torch.zeros(rows, columns // 2, dtype=torch.uint8),
        f"{DOWN}.weight_scale": torch.ones(rows, columns // 16).to(torch.float8_e4m3fn),
        f"{DOWN}.weight_scale_2": torch.tensor(0.01),
        f"{DOWN}.input_scale": torch.tensor(0.01),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    set_quantization(tmp_path, {"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ", "config_groups": {}})
    assert notes_of(tmp_path) == []
    with pytest.raises(UserError, match="odd' and 1 more: not supported"):
        factors = {f"{DOWN}.pre_quant_scale": torch.ones(columns), f"{DOWN}.odd": torch.ones(1)}
        notes_of(add(tmp_path, factors))


def test_scales_of_activations_and_caches_are_left_alone(tmp_path):
    save_int4_folder(tmp_path, LLAMA, compressed, COMPRESSED, group=32, symmetric=True)
    parts = ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "input_scale_ub", "k_scale")
    assert notes_of(add(tmp_path, {f"{DOWN}.{part}": torch.ones(1) for part in parts})) == []


def test_tensors_elsewhere_are_noted_as_before(tmp_path):
    save_int4_folder(tmp_path, LLAMA, compressed, COMPRESSED, group=32, symmetric=True)
    (note,) = notes_of(add(tmp_path, {"model.layers.0.self_attn.k_scale": torch.ones(1)}))
    assert note.endswith("does not take: model.layers.0.self_attn.k_scale")
