"""Rotary scaling of GGUF files: the frequencies of a folder of the same model, and the logits of llama.cpp."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import dist_qft
from dist_qft.base_model.model_config import read_model_config
from dist_qft.base_model.skeleton import build_skeleton
from dist_qft.config.schema import ModelConfig, QuantizationConfig
from dist_qft.errors import DistQFTError
from tests.support.llama_cpp import log_probability_errors
from tests.support.tiny_gguf import save_tiny_gguf
from tests.support.tiny_model import tiny_llama_config

IDS = [(5 * i + i * i) % 320 for i in range(60)]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "factor": 3.0}


def frequencies(parameters: dict[str, Any]) -> np.ndarray:
    """The library's own frequencies of the small model with these `rope_parameters`."""
    config = tiny_llama_config(rope_parameters={"rope_theta": 10000.0, **parameters})
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        return 10000.0 ** -(np.arange(0, 16, 2) / 16)
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))[0].double().numpy()


def factors(values: np.ndarray) -> Callable[[gguf.GGUFWriter], None]:
    return lambda writer: writer.add_tensor("rope_freqs.weight", values.astype(np.float32))


def scaling(kind: gguf.RopeScalingType, factor: float, **others: Any) -> Callable[[gguf.GGUFWriter], None]:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(kind)
        writer.add_rope_scaling_factor(factor)
        for name, value in others.items():
            getattr(writer, f"add_rope_scaling_{name}")(value)

    return add


ODD = np.linspace(1.0, 3.0, 8)
SCALINGS: dict[str, tuple[Callable[[gguf.GGUFWriter], None], dict[str, Any]]] = {
    "llama3": (factors(frequencies({"rope_type": "default"}) / frequencies(LLAMA3)), LLAMA3),
    "yarn": (scaling(gguf.RopeScalingType.YARN, 4.0, orig_ctx_len=32), YARN),
    "linear": (scaling(gguf.RopeScalingType.LINEAR, 3.0), LINEAR),
    "other factors": (
        factors(ODD),
        {
            "rope_type": "longrope",
            "short_factor": ODD.tolist(),
            "long_factor": ODD.tolist(),
            "factor": 1.0,
            "attention_factor": 1.0,
            "original_max_position_embeddings": 512,
        },
    ),
    "none": (scaling(gguf.RopeScalingType.NONE, 1.0), {"rope_type": "default"}),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_it_is_read_as_the_folder_of_the_same_model_has_it(tmp_path, name):
    add, expected = SCALINGS[name]
    path = save_tiny_gguf(tmp_path / "scaled.gguf", "F32", "F32", finish=add)
    config, _ = read_model_config(ModelConfig(path=str(path)))
    found = dict(config.rope_parameters)
    assert found.pop("rope_theta") == 10000.0
    for key, value in expected.items():
        assert found[key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-5))
    base = build_skeleton(ModelConfig(path=str(path)), QuantizationConfig(), torch.float32)
    np.testing.assert_allclose(base.decoder.rotary_emb.inv_freq, frequencies(expected), rtol=1e-5)


@pytest.mark.parametrize("name", SCALINGS)
def test_the_logits_are_those_of_llama_cpp(tmp_path, name):
    path = save_tiny_gguf(tmp_path / "scaled.gguf", "F32", "F32", finish=SCALINGS[name][0])
    plain = save_tiny_gguf(tmp_path / "plain.gguf", "F32", "F32")
    found, unscaled = (dist_qft.load(each).logits(torch.tensor([IDS]))[0] for each in (path, plain))
    ours, without = log_probability_errors(path, IDS, [found, unscaled], tuple(range(5, 61, 5)))
    assert ours < 0.02
    assert name == "none" or without > 5 * ours


def changed(**fields: Any) -> Callable[[gguf.GGUFWriter], None]:
    def add(writer: gguf.GGUFWriter) -> None:
        scaling(gguf.RopeScalingType.YARN, 4.0, orig_ctx_len=32)(writer)
        for name, value in fields.items():
            writer.add_float32(f"llama.rope.scaling.{name}", value)

    return add


@pytest.mark.parametrize(
    ("add", "words"),
    [
        (scaling(gguf.RopeScalingType.LONGROPE, 4.0), "rope scaling 'longrope' is not supported"),
        (changed(yarn_ext_factor=0.5), "'llama.rope.scaling.yarn_ext_factor' 0.5 is not supported"),
        (changed(yarn_log_multiplier=0.1), "yarn_log_multiplier"),
        (changed(yarn_beta_fast=-1.0), "must be a positive number"),
        (factors(np.ones(5)), "must be F32 [8]"),
        (factors(np.array([1.0, 1, 1, 0, 1, 1, 1, 1])), "holds a value that is not positive"),
        (lambda writer: writer.add_rope_scaling_factor(float("nan")), "must be a positive number"),
        (lambda writer: writer.add_string("llama.rope.scaling.factor", "4"), "must be a positive number"),
        (lambda writer: writer.add_key_length(8), "of a part of each head"),
    ],
)
def test_what_cannot_be_read_so_is_refused(tmp_path: Path, add, words):
    path = save_tiny_gguf(tmp_path / "refused.gguf", "F32", "F32", finish=add)
    with pytest.raises(DistQFTError) as refused:
        read_model_config(ModelConfig(path=str(path)))
    assert words in str(refused.value) and refused.value.exit_code in (2, 5)
