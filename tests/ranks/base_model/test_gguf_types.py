"""GGUF files of every common type, quantized by ggml itself: the same values as gguf's, the logits of llama.cpp."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import dist_qft
from dist_qft.base_model.gguf_file import GgufSource
from dist_qft.base_model.gguf_types import GGUF_TYPES
from dist_qft.base_model.model_tensors import check_names
from dist_qft.base_model.requantization import requantization_notes
from dist_qft.base_model.skeleton import build_skeleton
from dist_qft.config.schema import ModelConfig, QuantizationConfig
from tests.support.llama_cpp import log_probability_errors, quantize
from tests.support.tiny_gguf import save_tiny_gguf
from tests.support.tiny_model import tiny_llama_config

IDS = [(5 * i + i * i) % 320 for i in range(40)]
# Files as llama.cpp's own mixtures make them: most linear layers, tables, and the layer types that get more bits.
MIXTURES = {
    "Q4_0": ("Q4_0", "Q6_K", {}),
    "Q4_K_M": ("Q4_K", "Q6_K", {"v_proj": "Q6_K", "down_proj": "Q6_K"}),
    "Q5_K_M": ("Q5_K", "Q6_K", {"v_proj": "Q6_K", "down_proj": "Q6_K"}),
    "Q3_K_M": ("Q3_K", "Q6_K", {"v_proj": "Q5_K", "down_proj": "Q4_K"}),
    "Q2_K": ("Q2_K", "Q6_K", {"v_proj": "Q4_K", "down_proj": "Q3_K"}),
    "Q6_K": ("Q6_K", "Q6_K", {}),
    "Q8_0": ("Q8_0", "Q8_0", {}),
    "IQ4_NL": ("IQ4_NL", "Q5_0", {"v_proj": "Q5_1"}),
    "IQ4_XS": ("IQ4_XS", "Q4_K", {"v_proj": "IQ3_S"}),
}


def save(folder: Path, name: str) -> Path:
    linears, tables, others = MIXTURES[name]
    config = tiny_llama_config(hidden_size=256, intermediate_size=512, num_hidden_layers=2)
    return save_tiny_gguf(folder / f"{name}.gguf", linears, tables, others=others, config=config, quantize=quantize)


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_any_bytes_have_the_values_that_gguf_gives_them(kind):
    generator = np.random.default_rng(0)
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    shape = (6, 4 * block)
    raw = quantize(generator.standard_normal(shape, np.float32), gguf.GGMLQuantizationType[kind])
    noise = generator.integers(0, 256, raw.shape, np.uint8)
    halves = {"Q2_K": (80, 84), "Q6_K": (208, 210), "Q3_K": (108, 110)}.get(kind, (0, 4))  # float16 constants stay
    keep = np.zeros(size, bool)
    keep[slice(*halves)] = True
    raw = np.where(np.tile(keep, raw.shape[1] // size), raw, noise)
    twin = GGUF_TYPES[kind]
    packed = twin.packed(torch.from_numpy(raw))
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in packed.items()}
    assert shapes == twin.format.packed_shapes(shape)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(twin.format.dequantize(packed, shape, torch.float32).numpy(), expected)
    assert twin.packed(torch.from_numpy(raw[:0]))["codes"].shape[0] == 0


@pytest.mark.parametrize("name", MIXTURES)
def test_the_logits_are_those_of_llama_cpp(tmp_path, name):
    """As near as llama.cpp, which quantizes activations, comes; far nearer than to the weights before quantization."""
    path = save(tmp_path, name)
    config = tiny_llama_config(hidden_size=256, intermediate_size=512, num_hidden_layers=2)
    floats = save_tiny_gguf(tmp_path / "floats.gguf", "F32", "F32", config=config)
    found = dist_qft.load(path).logits(torch.tensor([IDS]))[0]
    before = dist_qft.load(floats).logits(torch.tensor([IDS]))[0]
    ours, unquantized = log_probability_errors(path, IDS, [found, before], (4, 10, 16, 19, 24, 30, 36, 40))
    print(f"{name}: {ours:.4f} from llama.cpp's log-probabilities, floats {unquantized:.4f}")
    assert ours < 0.3  # Q8_0 is off by 0.1 on this network of random weights
    if name not in ("Q8_0", "Q6_K"):  # as exact as llama.cpp's own activations
        assert ours < 0.5 * unquantized


@pytest.mark.parametrize("name", MIXTURES)
def test_what_becomes_of_each_type_is_said(tmp_path, name):
    path = save(tmp_path, name)
    base = build_skeleton(ModelConfig(path=str(path)), QuantizationConfig(), torch.float32)
    notes = requantization_notes(base, check_names(base, GgufSource(path)))
    kinds = {MIXTURES[name][0], MIXTURES[name][1], *MIXTURES[name][2].values()}
    assert {note.split()[1] for note in notes} == kinds
    for note in notes:
        exact = note.split()[1] in GGUF_TYPES
        assert note.endswith("value for value") == exact
        assert exact or ("-> q8_0: " in note and "quantized a second time, mean error" in note)
