"""int4 folders: which zeros a folder's settings mean, and settings that are refused."""

from functools import partial
from typing import Any

import pytest
import torch

from dist_qft.base_model.weight_files import open_source
from dist_qft.config.schema import ModelConfig
from dist_qft.errors import UserError
from tests.support.packed_folders import Packer, awq, gptq, save_int4_folder
from tests.support.tiny_model import tiny_llama_config

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
ROUND = GPTQ | {"quant_method": "auto-round"}
OLD = GPTQ | {"quant_method": "intel/auto-round"}
AS_THEY_ARE, ONE_LESS = partial(gptq, less=0), gptq
# AutoRound 0.16.1: `convert_hf_model` for what a loader takes, `inference/backend.py` for the zeros of each.
MEANT: dict[str, tuple[Packer, dict[str, Any]]] = {
    "gptq": (ONE_LESS, GPTQ),
    "gptq v1": (ONE_LESS, GPTQ | {"checkpoint_format": "gptq"}),
    "gptq v2": (AS_THEY_ARE, GPTQ | {"checkpoint_format": "gptq_v2"}),
    "gptq v2 by GPTQModel's other name": (AS_THEY_ARE, GPTQ | {"format": "gptq_v2"}),
    "auto_round": (AS_THEY_ARE, ROUND | {"packing_format": "auto_round"}),
    "gptqmodel": (AS_THEY_ARE, ROUND | {"packing_format": "auto_round:gptqmodel"}),
    "auto_gptq": (ONE_LESS, ROUND | {"packing_format": "auto_round:auto_gptq"}),
    "gptq of auto_round": (ONE_LESS, ROUND | {"packing_format": "auto_round:gptq"}),
    "auto_awq": (awq, ROUND | {"packing_format": "auto_round:auto_awq"}),
    "nothing said": (ONE_LESS, ROUND),
    "auto": (ONE_LESS, ROUND | {"backend": "auto"}),
    "old gptq": (ONE_LESS, OLD | {"backend": "auto_round:gptq:exllamav2"}),
    "old auto_round": (AS_THEY_ARE, OLD | {"backend": "auto_round:tritonv2"}),
    "old awq": (awq, OLD | {"backend": "auto_round:awq:gemm"}),
    "packing before backend": (AS_THEY_ARE, ROUND | {"packing_format": "auto_round", "backend": "auto_round:gptq"}),
}
CONFIG = tiny_llama_config(num_hidden_layers=1)
KEYS = "model.layers.0.self_attn.k_proj.weight"


@pytest.mark.parametrize("name", MEANT)
def test_zeros_are_those_that_the_settings_mean(tmp_path, name):
    pack, settings = MEANT[name]
    meant = save_int4_folder(tmp_path, CONFIG, pack, settings, group=32, symmetric=False)
    source = open_source(ModelConfig(path=str(tmp_path)))
    for weight, expected in meant.items():
        assert torch.equal(source.read(weight), expected), weight


@pytest.mark.parametrize("pack", [AS_THEY_ARE, ONE_LESS])
def test_symmetric_zeros_of_either_kind_are_8(tmp_path, pack):
    packing = "auto_round:gptqmodel" if pack is AS_THEY_ARE else "auto_round:gptq"
    settings = ROUND | {"sym": True, "packing_format": packing}
    meant = save_int4_folder(tmp_path, CONFIG, pack, settings, group=32, symmetric=True)
    assert torch.equal(open_source(ModelConfig(path=str(tmp_path))).read(KEYS), meant[KEYS])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (GPTQ | {"checkpoint_format": "marlin"}, "quantization_config.checkpoint_format: got 'marlin', must be one of"),
        (GPTQ | {"checkpoint_format": 2}, "quantization_config.checkpoint_format: got 2, must be one of gptq, gptq_v2"),
        (
            ROUND | {"packing_format": "auto_round:mlx"},
            "quantization_config.packing_format: got 'auto_round:mlx', must",
        ),
        (
            OLD | {"backend": "auto_round:hpu"},
            "quantization_config.backend: got 'auto_round:hpu', must be one of auto,",
        ),
        (ROUND | {"rotation_config": {"hadamard_type": "hadamard"}}, "AutoRound with rotation_config is not supported"),
        (ROUND | {"spinquant_config": {"r1": True}}, "AutoRound with spinquant_config is not supported"),
    ],
)
def test_settings_that_are_not_known_are_refused(tmp_path, settings, words):
    save_int4_folder(tmp_path, CONFIG, gptq, settings, group=32, symmetric=False)
    with pytest.raises(UserError) as raised:
        open_source(ModelConfig(path=str(tmp_path)))
    assert words in str(raised.value) and "\n" not in str(raised.value)
