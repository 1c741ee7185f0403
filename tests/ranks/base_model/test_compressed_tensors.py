"""Folders that compressed-tensors has written: our values are those of its own decompression, on any ranks."""

from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs

from dist_qft.base_model.weight_files import open_source
from dist_qft.config.schema import ModelConfig
from dist_qft.quant.affine4 import Affine4
from dist_qft.quant.codebook4 import Codebook4
from tests.support.compressed_folders import save_compressed
from tests.support.loading import loaded_fingerprint
from tests.support.tiny_model import tiny_llama_config

INT4, FP4, FP8 = {"num_bits": 4, "type": "int"}, {"num_bits": 4, "type": "float"}, {"num_bits": 8, "type": "float"}
VARIANTS = {
    "int4": INT4 | {"strategy": "group", "group_size": 8},
    "int4 asymmetric": INT4 | {"strategy": "group", "group_size": 8, "symmetric": False},
    "int4 by outputs": INT4 | {"strategy": "channel"},
    "int4 by outputs, asymmetric": INT4 | {"strategy": "channel", "symmetric": False},
    "fp8": FP8 | {"strategy": "tensor"},
    "fp8 by outputs": FP8 | {"strategy": "channel"},
    "fp8 by blocks": FP8 | {"strategy": "block", "block_structure": [16, 8]},
    "mxfp4": FP4 | {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8, "zp_dtype": torch.uint8},
    "nvfp4": FP4 | {"strategy": "tensor_group", "group_size": 16, "scale_dtype": torch.float8_e4m3fn},
}
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, torch.Tensor]]]:
    """Two layers with biases. Widths are odd multiples of 8: no multiples of an FP8 block's 16 rows."""
    to, made = tmp_path_factory.mktemp("compressed"), {}
    odd = {"hidden_size": 72, "intermediate_size": 152, "num_key_value_heads": 1}
    for name, settings in VARIANTS.items():
        sizes = {} if name in ("mxfp4", "nvfp4") else odd
        config = tiny_llama_config(num_hidden_layers=2, attention_bias=True, initializer_range=0.05, **sizes)
        made[name] = (to / name, save_compressed(to / name, config, QuantizationArgs(**settings)))
    return made


@pytest.mark.parametrize("name", VARIANTS)
def test_values_are_those_of_the_librarys_decompression(folders, name):
    folder, meant = folders[name]
    source = open_source(ModelConfig(path=str(folder)))
    assert len(meant) == 12 and {"model.layers.0.self_attn.o_proj.weight", "lm_head.weight"} <= source.names()
    for weight, expected in meant.items():
        assert source.kind(weight) is not None and expected.unique().numel() > 8
        assert torch.equal(source.read(weight), expected), weight
        assert torch.equal(source.read(weight, (3, 18)), expected[3:18])
    assert source.kind("model.layers.0.self_attn.o_proj.weight") is None


def test_formats_are_those_that_hold_the_values(folders):
    found = {
        name: open_source(ModelConfig(path=str(folder))).stored_format(DOWN) for name, (folder, _) in folders.items()
    }
    assert found["int4 asymmetric"] == Affine4((1, 8), "float32") and found["int4 by outputs"].block == (1, 152)
    assert found["mxfp4"] == Codebook4("mxfp4") and found["nvfp4"] == Codebook4("nvfp4-divided")
    assert found["fp8 by blocks"] is None


@pytest.mark.parametrize(("world", "engine"), [(2, "zero"), (3, "fsdp")])
def test_the_same_base_on_any_number_of_ranks(pools, folders, world, engine):
    for name in ("int4 asymmetric", "fp8 by blocks", "nvfp4"):
        section = {"linear": "affine4", "block": [1, 8]} if "fp8" in name else {}
        request = {"path": folders[name][0], "quantization": section}
        alone = pools[1].run(loaded_fingerprint, engine_name="replicated", **request)
        assert pools[world].run(loaded_fingerprint, engine_name=engine, **request) == alone * world
