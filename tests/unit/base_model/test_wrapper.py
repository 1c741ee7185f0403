"""Multimodal models read as their text decoder: which class is built, what of it is kept, what is refused."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, T5Gemma2Config

from dist_qft.base_model.skeleton import build_skeleton
from dist_qft.base_model.wrapper import auto_class
from dist_qft.config.schema import ModelConfig, QuantizationConfig
from dist_qft.errors import UserError
from tests.support.families import refused
from tests.support.wrappers import WRAPPERS, save_wrapper, wrapper_config

DENSE = QuantizationConfig(linear="dense", embedding="dense")


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wrapper("gemma3", tmp_path_factory.mktemp("gemma3"))


def with_config(folder: Path, to: Path, **changes: object) -> Path:
    to.mkdir()
    for file in folder.glob("*.safetensors"):
        (to / file.name).symlink_to(file)
    content = json.loads((folder / "config.json").read_text()) | changes
    (to / "config.json").write_text(json.dumps(content))
    return to


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapper_is_built_unless_the_text_model_alone_is_named(kind):
    config = wrapper_config(kind)
    assert auto_class(config) is AutoModelForMultimodalLM
    assert auto_class(config.get_text_config()) is AutoModelForCausalLM


def test_the_text_model_alone_by_its_architecture():
    config = wrapper_config("qwen3_5")
    config.architectures = ["Qwen3_5ForCausalLM"]
    assert auto_class(config) is AutoModelForCausalLM


def test_an_encoder_decoder_is_refused():
    with pytest.raises(UserError, match="encoder-decoder") as raised:
        auto_class(T5Gemma2Config())
    assert raised.value.exit_code == 2


def test_nothing_but_the_text_decoder_is_kept(gemma):
    base = build_skeleton(ModelConfig(path=str(gemma)), DENSE, torch.float32)
    assert base.wrapped and base.tied
    names = [name for name, _ in [*base.model.named_parameters(), *base.model.named_buffers()]]
    assert names and all(name.startswith(("model.language_model.", "lm_head.")) for name in names)
    assert base.notes == []


def test_the_text_parts_quantization_is_read_or_refused(gemma, tmp_path):
    text = json.loads((gemma / "config.json").read_text())["text_config"]
    method = {"quantization_config": {"quant_method": "some_method"}}
    folder = with_config(gemma, tmp_path / "unknown", text_config=text | method)
    assert "is already quantized by some_method" in refused(folder)
    method = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}
    folder = with_config(gemma, tmp_path / "promised", text_config=text | method)
    assert "promises quantized weights, but none is stored" in refused(folder)


@pytest.mark.parametrize(
    ("name", "from_hub", "message"),
    [
        ("spda", False, "got 'spda', must be eager, "),
        ("flash_attention_3", False, "whose package is not installed"),
        ("someone/attention", False, "set model.attention_from_hub to true"),
    ],
)
def test_attention_that_cannot_be_had_is_refused(gemma, name, from_hub, message):
    model = ModelConfig(path=str(gemma), attention=name, attention_from_hub=from_hub)
    with pytest.raises(UserError, match=message) as raised:
        build_skeleton(model, DENSE, torch.float32)
    assert raised.value.exit_code == 2 and str(raised.value).startswith("model.attention: got ")
