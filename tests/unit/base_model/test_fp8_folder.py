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
from tests.support.families import FAMILIES, open_packed, save_random
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


STACKS = "model.layers.{}.mlp.experts.{}"
# Shape of the scales of a stack of 4 matrices (rows, columns) -> its words; blocks are of 16 x 32.
GRIDS = {
    "(E,)": (lambda rows, columns: (4,), "one scale"),
    "(E, 1, 1)": (lambda rows, columns: (4, 1, 1), "one scale"),
    "(E, rows, 1)": (lambda rows, columns: (4, rows, 1), "a scale per output"),
    "blocks": (lambda rows, columns: (4, rows // 16, columns // 32), "blocks of 16 x 32"),
}


def with_stacks(folder: Path, grid: str, suffix: str) -> dict[str, torch.Tensor]:
    """Give a mixture stacked experts in FP8, as transformers stores its own; returns what they stand for by path."""
    save_random(FAMILIES["qwen3_moe"], folder)
    tensors = {name: t for name, t in load_file(folder / "model.safetensors").items() if ".experts." not in name}
    meant, generator = {}, torch.Generator().manual_seed(3)
    for layer in range(2):
        for product, (rows, columns) in {"gate_up_proj": (64, 64), "down_proj": (64, 32)}.items():
            code = (torch.randn(4, rows, columns, generator=generator) * 50).to(torch.float8_e4m3fn)
            scale = torch.rand(GRIDS[grid][0](rows, columns), generator=generator) * 1e-3 + 1e-3
            path = STACKS.format(layer, product)
            tensors |= {f"{path}{suffix}": code, f"{path}{'.weight' if suffix else ''}_scale_inv": scale}
            spread = scale.view(4, *scale.shape[1:], *[1] * (3 - scale.dim()))
            for dim, size in ((1, rows), (2, columns)):
                spread = spread.repeat_interleave(size // spread.shape[dim], dim)
            meant[path] = code.float() * spread
    save_file(tensors, folder / "model.safetensors")
    set_quantization(folder, {"quant_method": "fp8", "weight_block_size": [16, 32]})
    return meant


@pytest.mark.parametrize("suffix", ["", ".weight"])
@pytest.mark.parametrize("grid", GRIDS)
def test_stacked_experts_have_a_scale_for_each_expert_row_or_block(tmp_path, grid, suffix):
    meant = with_stacks(tmp_path, grid, suffix)
    source = open_source(ModelConfig(path=str(tmp_path)))
    assert {source.kind(f"{path}{suffix}") for path in meant} == {f"FP8 E4M3, {GRIDS[grid][1]}"}
    base = open_packed(tmp_path)
    assert base.experts.keys() == meant.keys()
    for path, expected in meant.items():
        assert torch.equal(base.experts[path].dequantize().view(expected.shape), expected)
        assert torch.equal(source.read(f"{path}{suffix}", (1, 3)), expected[1:3])


def test_scales_of_another_number_of_experts_are_refused(tmp_path):
    with_stacks(tmp_path, "(E,)", "")
    tensors = load_file(tmp_path / "model.safetensors")
    name = f"{STACKS.format(0, 'down_proj')}_scale_inv"
    save_file(tensors | {name: torch.ones(5)}, tmp_path / "model.safetensors")
    with pytest.raises(CorruptFileError, match=r"_scale_inv' is \[5\], must have 4 entries"):
        open_source(ModelConfig(path=str(tmp_path)))
