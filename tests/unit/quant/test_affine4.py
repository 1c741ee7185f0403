"""affine4 against GGUF's Q4_1 byte for byte, and every block shape against float64 arithmetic written here."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_qft.errors import UserError
from dist_qft.quant.affine4 import Affine4, affine4_from_q4_1, q4_1_from_affine4

NORMAL = torch.randn(2048, 576, generator=torch.Generator().manual_seed(0))


def q4_1(weight: np.ndarray) -> np.ndarray:
    return gguf.quants.quantize(weight, GGMLQuantizationType.Q4_1)


def unpack(codes: torch.Tensor, in_features: int) -> np.ndarray:
    """Codes in input order, by the documented packing, one nibble at a time."""
    group = max(g for g in (2, 4, 8, 16, 32) if in_features % g == 0)
    unpacked = np.zeros((codes.shape[0], in_features), dtype=np.int64)
    for row, data in enumerate(codes.tolist()):
        for column in range(in_features):
            start, offset = column // group * group, column % group
            byte = data[start // 2 + offset % (group // 2)]
            unpacked[row, column] = byte & 15 if offset < group // 2 else byte >> 4
    return unpacked


@pytest.mark.parametrize(
    "weight",
    [
        NORMAL[:5, :64],
        NORMAL,  # more than one chunk of rows
        NORMAL[:3, :96] * 1e-3 + 5.0,
        NORMAL[:4, :32] * 1e4,
        NORMAL[:4, :32] * 1e-7,  # scales that are subnormal in float16, or vanish
        torch.zeros(2, 64),
        torch.full((2, 64), -3.25),
        torch.cat([torch.zeros(1, 32), NORMAL[:1, :32]], dim=1),
    ],
    ids=["normal", "chunks", "offset", "large", "tiny", "zero", "constant", "mixed"],
)
def test_block_1_32_is_q4_1_byte_for_byte(weight):
    shape = tuple(weight.shape)
    packed = Affine4().quantize(weight)
    raw = q4_1(weight.numpy())
    np.testing.assert_array_equal(q4_1_from_affine4(packed, shape).numpy(), raw)
    dequantized = Affine4().dequantize(packed, shape, torch.float32)
    np.testing.assert_array_equal(dequantized.numpy(), gguf.quants.dequantize(raw, GGMLQuantizationType.Q4_1))


def test_any_q4_1_bytes_survive_the_round_trip():
    raw = torch.randint(0, 256, (7, 3 * 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    raw[0, :4] = torch.tensor([0xFF, 0x7F, 0x01, 0xFC])  # constants that are NaN as float16
    packed = affine4_from_q4_1(raw)
    expected = Affine4().packed_shapes((7, 96))
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in packed.items()} == expected
    assert torch.equal(q4_1_from_affine4(packed, (7, 96)), raw)
    assert affine4_from_q4_1(raw[:0])["codes"].shape == (0, 48)


@settings(max_examples=60, deadline=None)
@given(
    block=st.tuples(st.integers(1, 9), st.integers(1, 40)),
    counts=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_block_shape_against_float64(block, counts, seed):
    b_out, b_in = block
    shape = (b_out * counts[0], b_in * counts[1] * (1 + b_in * counts[1] % 2))
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    format = Affine4(block)
    packed = format.quantize(weight)
    codes, scale, zero = unpack(packed["codes"], shape[1]), packed["scale"].double(), packed["zero"].double()
    restored = format.dequantize(packed, shape, torch.float64).numpy()
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            at = np.s_[i * b_out : (i + 1) * b_out, j * b_in : (j + 1) * b_in]
            exact = weight.double().numpy()[at]
            low, step = exact.min(), (exact.max() - exact.min()) / 15
            assert float(zero[i, j]) == pytest.approx(low, rel=2**-11, abs=2**-25)
            assert float(scale[i, j]) == pytest.approx(step, rel=2**-10, abs=2**-24)
            if step > 0:
                assert np.abs((exact - low) / step - codes[at]).max() <= 0.5 + 1e-5
            expected = float(scale[i, j]) * codes[at] + float(zero[i, j])
            np.testing.assert_allclose(restored[at], expected, rtol=0, atol=1e-6)
            rounding = 15 * 2**-11 * step + 2**-11 * abs(low) + 1e-5
            assert np.abs(restored[at] - exact).max() <= step / 2 + rounding


def test_blocks_without_a_usable_scale_come_back_as_they_are():
    weight = torch.tensor([[0.0, -0.0], [-0.0, 0.0], [1e-44, 2e-44]])
    packed = Affine4((1, 2)).quantize(weight)
    assert all(tensor.count_nonzero() == 0 for tensor in packed.values())
    assert not packed["zero"].signbit().any()


def test_refuses_what_does_not_fit_naming_the_nearest_blocks():
    with pytest.raises(UserError) as refused:
        Affine4((3, 32)).check((64, 100), "model.layers.0.mlp.up_proj")
    assert str(refused.value) == (
        "model.layers.0.mlp.up_proj: affine4 block [3, 32] cannot hold a weight of shape (64, 100): "
        "3 does not divide out_features 64 (nearest: 2 or 4); 32 does not divide in_features 100 (nearest: 25 or 50)"
    )
    assert refused.value.exit_code == 2
    with pytest.raises(UserError, match="in_features 5 is odd, two codes share a byte"):
        Affine4((1, 5)).quantize(torch.zeros(2, 5))
    with pytest.raises(UserError, match=r"4096 does not divide out_features 64 \(nearest: 64\)"):
        Affine4((4096, 2)).check((64, 64), "w")
    with pytest.raises(UserError, match=r"quantization.block: got \[0, 32\], must be two sizes of at least 1"):
        Affine4((0, 32))


def test_refuses_weights_beyond_float16_constants():
    with pytest.raises(UserError, match=r"^w: a block of weights needs a constant of 200000, float16 ends at 65504$"):
        Affine4().quantize(torch.full((1, 32), -2e5), "w")


def test_only_block_1_32_becomes_q4_1():
    packed = Affine4((8, 4)).quantize(NORMAL[:8, :64])
    with pytest.raises(UserError, match=r"GGUF Q4_1 holds affine4 with block \[1, 32\] only, got \(1, 16\) blocks"):
        q4_1_from_affine4(packed, (8, 64))
