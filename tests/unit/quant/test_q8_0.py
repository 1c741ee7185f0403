"""q8_0 against GGUF's Q8_0 byte for byte, and odd widths against float64 arithmetic written here."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_qft.errors import UserError
from dist_qft.quant.q8_0 import Q8_0, gguf_from_q8_0, q8_0_from_gguf

NORMAL = torch.randn(2048, 576, generator=torch.Generator().manual_seed(0))


def halves() -> torch.Tensor:
    """Every k + 0.5 between -126.5 and 126.5 at scale 1: halves must round away from zero."""
    return torch.cat([torch.full((8, 1), 127.0), (torch.arange(248.0).view(8, 31) - 123.5)], dim=1)


@pytest.mark.parametrize(
    "weight",
    [NORMAL[:5, :64], NORMAL, NORMAL[:3, :32] * 1e-8, torch.zeros(2, 32), halves()],
    ids=["normal", "chunks", "tiny", "zero", "halves"],
)
def test_is_gguf_byte_for_byte(weight):
    shape = tuple(weight.shape)
    packed = Q8_0().quantize(weight)
    raw = gguf.quants.quantize(weight.numpy(), GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(gguf_from_q8_0(packed, shape).numpy(), raw)
    dequantized = Q8_0().dequantize(packed, shape, torch.float32)
    np.testing.assert_array_equal(dequantized.numpy(), gguf.quants.dequantize(raw, GGMLQuantizationType.Q8_0))


def test_any_gguf_bytes_survive_the_round_trip():
    raw = torch.randint(0, 256, (7, 3 * 34), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    raw[0, :2] = torch.tensor([0xFF, 0x7F])  # a scale that is NaN as float16
    packed = q8_0_from_gguf(raw)
    expected = Q8_0().packed_shapes((7, 96))
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in packed.items()} == expected
    assert torch.equal(gguf_from_q8_0(packed, (7, 96)), raw)
    assert q8_0_from_gguf(raw[:0])["codes"].shape == (0, 96)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 6), in_features=st.integers(1, 130), seed=st.integers(0, 2**32 - 1))
def test_every_width_against_float64(rows, in_features, seed):
    weight = torch.randn(rows, in_features, generator=torch.Generator().manual_seed(seed))
    packed = Q8_0().quantize(weight)
    block = max(b for b in range(1, 33) if in_features % b == 0)
    exact = weight.double().numpy().reshape(rows, -1, block)
    scale = np.abs(exact).max(-1) / 127
    np.testing.assert_allclose(packed["scale"].double().numpy(), scale, rtol=2**-10, atol=2**-24)
    codes = packed["codes"].numpy().reshape(exact.shape).astype(np.float64)
    assert np.abs(exact / scale[..., None] - codes).max() <= 0.5 + 1e-4
    expected = codes * packed["scale"].double().numpy()[..., None]
    restored = Q8_0().dequantize(packed, (rows, in_features), torch.float64).numpy().reshape(exact.shape)
    np.testing.assert_allclose(restored, expected, rtol=1e-7)


def test_blocks_too_small_for_a_scale_come_back_as_zeros():
    packed = Q8_0().quantize(torch.full((1, 32), 1e-44))
    assert all(tensor.count_nonzero() == 0 for tensor in packed.values())


def test_a_width_that_32_does_not_divide_is_not_gguf():
    packed = Q8_0().quantize(NORMAL[:2, :48])
    with pytest.raises(UserError, match="GGUF Q8_0 needs in_features to be a multiple of 32") as refused:
        gguf_from_q8_0(packed, (2, 48))
    assert refused.value.exit_code == 2
