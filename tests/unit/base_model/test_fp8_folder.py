"""FP8 folders: the scales that other programs write, and those that are refused."""

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization.quant_scheme import MXFP8A16
from safetensors.torch import load_file, save_file

from dist_qft.base_model.weight_files import open_source
from dist_qft.config.schema import ModelConfig
from dist_qft.errors import CorruptFileError
from tests.support.compressed_folders import save_compressed
from tests.support.packed_folders import set_quantization
from tests.support.tiny_model import save_tiny_model, tiny_llama_config

KEYS = "model.layers.0.self_attn.k_proj.weight"
SCALE = f"{KEYS}_scale"
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}


@pytest.fixture(scope="module")
def mxfp8(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("mxfp8")
    return folder, save_compressed(folder, tiny_llama_config(num_hidden_layers=1), MXFP8A16["weights"])


def damaged(folder: Path, to: Path, change: dict[str, torch.Tensor]) -> Path:
    """The folder with some of its tensors replaced."""
    save_file(load_file(folder / "model.safetensors") | change, to / "model.safetensors")
    (to / "config.json").write_bytes((folder / "config.json").read_bytes())
    return to


def test_mxfp8_of_compressed_tensors_has_the_librarys_values(mxfp8):
    folder, meant = mxfp8
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["format"] == "mxfp8-quantized"
    source = open_source(ModelConfig(path=str(folder)))
    assert source.kind(KEYS) == "FP8 E4M3, blocks of 1 x 32" and len(meant) == 6
    for name, expected in meant.items():
        assert expected.unique().numel() > 50
        assert torch.equal(source.read(name), expected), name
        assert torch.equal(source.read(name, (3, 18)), expected[3:18])


def test_exponents_of_their_own_type_are_read_as_bytes_are(mxfp8, tmp_path):
    folder, meant = mxfp8
    scale = load_file(folder / "model.safetensors")[SCALE]
    typed = damaged(folder, tmp_path, {SCALE: scale.view(torch.float8_e8m0fnu)})
    set_quantization(typed, {"quant_method": "modelopt", "quant_algo": "MXFP8"})  # blocks that nothing states
    assert torch.equal(open_source(ModelConfig(path=str(typed))).read(KEYS), meant[KEYS])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.float8_e4m3fn])
def test_a_scale_of_another_type_is_refused(mxfp8, tmp_path, dtype):
    folder, _ = mxfp8
    scale = load_file(folder / "model.safetensors")[SCALE]
    with pytest.raises(CorruptFileError) as raised:
        open_source(ModelConfig(path=str(damaged(folder, tmp_path, {SCALE: scale.to(dtype)}))))
    kind = {torch.int32: "I32", torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3"}[dtype]
    assert str(raised.value).endswith(f"scale '{SCALE}' is {kind}, must be one of F32, F16, BF16, U8, F8_E8M0")


def test_blocks_of_modelopt_have_a_dimension_for_each_side(tmp_path):
    save_tiny_model(tmp_path, tiny_llama_config(num_hidden_layers=1, hidden_size=160, intermediate_size=288))
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    code = (torch.randn(160, 288, generator=torch.Generator().manual_seed(1)) * 50).to(torch.float8_e4m3fn)
    scale = torch.tensor([[0.5, 2.0, 3.0], [5.0, 0.25, 7.0]])
    save_file(tensors | {name: code, f"{name}_scale": scale.view(2, 1, 3, 1)}, tmp_path / "model.safetensors")
    set_quantization(tmp_path, MODELOPT)
    spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:160, :288]
    assert torch.equal(open_source(ModelConfig(path=str(tmp_path))).read(name), code.float() * spread)
