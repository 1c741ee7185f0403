"""Biases in GGUF files of Llamas: the model has them, with the values that llama.cpp adds."""

import pytest
import torch

import dist_qft
from dist_qft.errors import UserError
from tests.support.llama_cpp import log_probability_error
from tests.support.tiny_gguf import save_tiny_gguf
from tests.support.tiny_model import tiny_llama_config

IDS = [(5 * i + i * i) % 320 for i in range(40)]


@pytest.mark.parametrize("biases", [{"attention_bias": True}, {"mlp_bias": True}])
def test_logits_are_llama_cpps(tmp_path, biases):
    path = save_tiny_gguf(tmp_path / "model.gguf", "F32", "F32", config=tiny_llama_config(**biases))
    logits = dist_qft.load(path).logits(torch.tensor([IDS]))[0]
    assert log_probability_error(path, IDS, logits, (10, 40)) < 2e-3


def test_a_layer_without_its_bias_beside_others_is_refused(tmp_path):
    """The library's Llama has all of attention's biases or none."""

    def without_output(writer):
        for tensors in writer.tensors:
            for name in [name for name in tensors if name.endswith("attn_output.bias")]:
                del tensors[name]

    config = tiny_llama_config(attention_bias=True)
    path = save_tiny_gguf(tmp_path / "model.gguf", config=config, finish=without_output)
    with pytest.raises(UserError, match=r"has no tensor 'model\.layers\.0\.self_attn\.o_proj\.bias'"):
        dist_qft.load(path)
