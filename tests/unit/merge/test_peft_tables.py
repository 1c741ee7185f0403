"""Our list of adapters that stock PEFT drops or refuses, against the installed PEFT's own tables."""

import inspect
import re

import pytest

from dist_qft.errors import UserError
from dist_qft.merge.writers import peft_support as support
from dist_qft.methods.adapters.schedule import TileSettings

SETTINGS = TileSettings(in_features=64, out_features=64, pool=1, repeat=1, rank=4, alpha=4.0, inner=4)


def tables():
    return pytest.importorskip("peft.utils.transformers_weight_conversion")


def test_names_of_experts_are_those_of_the_installed_peft():
    found = {name: tuple(sorted(table)) for name, table in tables()._MOE_TARGET_MODULE_MAPPING.items()}
    assert found == {name: tuple(sorted(names)) for name, names in support._EXPERT_NAMES.items()}
    known = tables()._MODEL_TO_CONVERSION_PATTERN
    assert {name: support._CONVERSIONS[name] for name in known} == dict(known)


def test_state_space_models_are_those_of_the_installed_peft():
    utils = pytest.importorskip("peft.tuners.tuners_utils")
    text = inspect.getsource(utils._check_lora_target_modules_mamba)
    types, names = (set(re.findall(r'"(\w+)"', re.search(rf"{key} = (\{{.*?\}})", text)[1])) for key in (
        "mamba_model_types", "incompatible_modules",
    ))  # fmt: skip
    assert types == set(support._MAMBA_TYPES) and names == set(support._MAMBA_NAMES)


@pytest.mark.parametrize(
    ("model_type", "path"),
    [
        ("deepseek_v3", "model.layers.0.mlp.gate_proj"),
        ("glm4_moe", "model.layers.0.mlp.down_proj"),
        ("mixtral", "model.layers.0.mlp.w1"),
        ("falcon_h1", "model.layers.0.mamba.out_proj"),
        ("nemotron_h", "model.layers.0.mixer.out_proj"),
    ],
)
def test_adapters_that_peft_would_lose_are_refused_with_the_layer_and_a_way_out(model_type, path):
    with pytest.raises(UserError, match="--to peft") as refusal:
        support.require_peft_support(model_type, {"model.layers.0.self_attn.q_proj": SETTINGS, path: SETTINGS})
    assert path in str(refusal.value) and "method.targets" in str(refusal.value)
    support.require_peft_support(model_type, {"model.layers.0.self_attn.q_proj": SETTINGS})
    support.require_peft_support("llama", {path: SETTINGS})
