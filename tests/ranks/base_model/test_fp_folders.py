"""FP8, MXFP4 and NVFP4 folders: every weight is the one that is meant, and the loaded base has those weights."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import dist_qft
from dist_qft.base_model.weight_files import open_source
from dist_qft.config.schema import ModelConfig
from dist_qft.errors import DistQFTError
from dist_qft.plan import make_plan
from dist_qft.quant.codebook4 import Codebook4
from tests.support.loading import loaded_fingerprint
from tests.support.packed_folders import float_twin, set_quantization
from tests.support.tiny_model import save_tiny_model, tiny_config, tiny_llama_config

IDS = torch.arange(3, 40)[None]
PARTS = ("_packed", "_scale", "_scale_inv", "_scale_2", "_global_scale")
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 32]}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": {}}
WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 32]}
TOKENS = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
VARIANTS: dict[str, dict[str, Any]] = {
    "fp8 blocks": FP8,
    "fp8 blocks of a group": {**COMPRESSED, "config_groups": {"g": {"weights": WEIGHTS, "input_activations": TOKENS}}},
    "fp8 rows": COMPRESSED,
    "fp8 tensor": COMPRESSED,
    "mxfp4": COMPRESSED,
    "nvfp4-divided": COMPRESSED,
    "nvfp4": MODELOPT,
}
GATE = "model.layers.0.mlp.gate_proj"


def pack(name: str, weight: torch.Tensor, generator: torch.Generator) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Random parts of one weight by their suffixes, and the weight that they mean."""
    rows, columns = weight.shape
    if name.startswith("fp8"):
        code = (torch.randn(rows, columns, generator=generator) * 50).to(torch.float8_e4m3fn)
        blocks = "blocks" in name
        shape = {"fp8 rows": (rows, 1), "fp8 tensor": (1,)}.get(name, (-(-rows // 16), -(-columns // 32)))
        scale = torch.rand(shape, generator=generator) * 1e-3 + 1e-4
        spread = scale.repeat_interleave(16, 0).repeat_interleave(32, 1)[:rows, :columns] if blocks else scale
        suffix = "weight_scale_inv" if name == "fp8 blocks" else "weight_scale"
        return {"weight": code, suffix: scale}, code.float() * spread
    nibbles = torch.randint(0, 16, (rows, columns), generator=generator)
    codes = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).to(torch.uint8)
    values = torch.where(nibbles >= 8, -E2M1[nibbles & 7], E2M1[nibbles & 7])
    if name == "mxfp4":
        scale = torch.randint(115, 123, (rows, columns // 32), generator=generator).to(torch.uint8)
        factor = torch.exp2(scale.float() - 127).repeat_interleave(32, 1)
        return {"weight_packed": codes, "weight_scale": scale}, values * factor
    scale = (torch.rand(rows, columns // 16, generator=generator) * 300 + 50).to(torch.float8_e4m3fn)
    whole = torch.rand(1, generator=generator) * 1e-4 + 1e-5
    if name == "nvfp4":
        parts = {"weight": codes, "weight_scale": scale, "weight_scale_2": whole[0]}
        return parts, values * (scale.float() * whole).repeat_interleave(16, 1)
    whole = 1 / whole
    parts = {"weight_packed": codes, "weight_scale": scale, "weight_global_scale": whole}
    return parts, values * (scale.float() / whole).repeat_interleave(16, 1)


def save(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Two layers with biases; o_proj stays as floats. Widths that blocks of FP8 do not divide."""
    widths = {"hidden_size": 72, "intermediate_size": 152, "num_key_value_heads": 1} if "fp8" in name else {}
    save_tiny_model(folder, tiny_llama_config(num_hidden_layers=2, attention_bias=True, **widths))
    generator = torch.Generator().manual_seed(3)
    tensors, meant = load_file(folder / "model.safetensors"), {}
    for weight in [each for each in tensors if each.endswith("_proj.weight") and "o_proj" not in each]:
        module = weight.removesuffix(".weight")
        parts, meant[weight] = pack(name, tensors.pop(weight), generator)
        tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in parts.items()}
    save_file(tensors, folder / "model.safetensors")
    set_quantization(folder, VARIANTS[name])
    return meant


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, torch.Tensor]]]:
    to = tmp_path_factory.mktemp("fp")
    return {name: (to / name, save(to / name, name)) for name in VARIANTS}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_weight_is_the_one_that_is_meant(folders, name):
    folder, meant = folders[name]
    source = open_source(ModelConfig(path=str(folder)))
    for weight, expected in meant.items():
        assert source.shape(weight) == tuple(expected.shape) and source.is_float(weight) and source.kind(weight)
        assert source.stored_format(weight) == (None if "fp8" in name else Codebook4(name))
        assert torch.equal(source.read(weight), expected)
        for first, stop in ((0, 1), (5, 9), (7, 7), (3, 18)):
            assert torch.equal(source.read(weight, (first, stop)), expected[first:stop])
    assert not any(part.endswith(PARTS) for part in source.names())


@pytest.mark.parametrize("name", VARIANTS)
def test_the_logits_are_those_of_the_same_weights_as_floats(folders, tmp_path, name):
    folder, meant = folders[name]
    twin = float_twin(folder, tmp_path / "floats", meant, PARTS)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32)(IDS).logits
    found = dist_qft.load(folder).logits(IDS)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "section", "start", "end"),
    [
        (
            "fp8 blocks",
            {"linear": "affine4", "block": [1, 8]},
            "FP8 E4M3, blocks of 16 x 32 -> affine4 [1, 8]",
            "error",
        ),
        ("fp8 rows", {"linear": "dense"}, "FP8 E4M3, a scale per output -> dense", "dequantized without an error"),
        ("mxfp4", {"linear": "nf4"}, "MXFP4 (mxfp4) -> nf4 64", "error"),
        ("nvfp4-divided", {"linear": "auto"}, "NVFP4 (nvfp4-divided) -> codebook4 nvfp4-divided", "value for value"),
    ],
)
def test_validate_says_what_becomes_of_the_weights(folders, tmp_path, name, section, start, end):
    """`validate` prints the plan's warnings."""
    quantization = {"block": None, **section}
    method = {"name": "qlora", "rank": 4}
    config = tiny_config(folders[name][0], tmp_path / "run", quantization=quantization, method=method)
    notes = [note for note in make_plan(config, 1).warnings if " -> " in note]
    assert len(notes) == 1 and notes[0].startswith(f"{start}: 12 weights, ")
    if end == "error":
        mean, largest = re.search(
            r"second time, mean error ([\d.]+)% of the mean weight, largest ([\d.]+)%", notes[0]
        ).groups()
        assert 0 < float(mean) < float(largest)
    else:
        assert notes[0].endswith(end)


@pytest.mark.parametrize(("world", "engine"), [(2, "fsdp"), (2, "zero"), (3, "fsdp")])
def test_the_same_base_on_any_number_of_ranks(pools, folders, world, engine):
    for name, section in {"fp8 blocks": {"linear": "affine4", "block": [1, 8]}, "mxfp4": {}, "nvfp4": {}}.items():
        request = {"path": folders[name][0], "quantization": section}
        alone = pools[1].run(loaded_fingerprint, engine_name="replicated", **request)
        assert pools[world].run(loaded_fingerprint, engine_name=engine, **request) == alone * world


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("fp8 blocks", lambda t: t.pop(f"{GATE}.weight_scale_inv"), "has no scale beside it"),
        ("fp8 rows", lambda t: t.update({f"{GATE}.weight_scale": torch.ones(7, 1)}), "which fits neither"),
        ("mxfp4", lambda t: t.pop(f"{GATE}.weight_scale"), "has no tensor"),
        ("mxfp4", lambda t: t.update({f"{GATE}.weight_scale": torch.ones(3, 1)}), "must be U8"),
        ("nvfp4", lambda t: t.pop(f"{GATE}.weight"), "has no tensor"),
        ("mxfp4", lambda t: t[f"{GATE}.weight_scale"].fill_(255), "not finite"),
        ("nvfp4", lambda t: t.update({f"{GATE}.weight": torch.zeros(4, dtype=torch.uint8)}), "must be a matrix"),
        ("nvfp4", lambda t: t[f"{GATE}.weight_scale_2"].fill_(torch.nan), "not finite"),
    ],
)
def test_damage_is_named(folders, tmp_path, name, damage, words):
    folder = tmp_path / "damaged"
    folder.mkdir()
    tensors = load_file(folders[name][0] / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text((folders[name][0] / "config.json").read_text())
    with pytest.raises(DistQFTError) as refused:
        source = open_source(ModelConfig(path=str(folder)))
        source.read_packed(f"{GATE}.weight")
    assert words in str(refused.value) and "\n" not in str(refused.value) and refused.value.exit_code in (2, 5)


def test_nothing_is_quantized_into_a_codebook(tmp_path):
    with pytest.raises(DistQFTError, match="only read from files"):
        Codebook4("mxfp4").quantize(torch.zeros(2, 32), "w")
    assert json.loads(json.dumps(Codebook4("nvfp4").describe())) == {"name": "codebook4", "kind": "nvfp4"}
