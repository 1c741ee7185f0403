"""nf4 against bitsandbytes bit for bit, and against the codebook of the QLoRA paper in float64."""

import hashlib
import subprocess
import sys
from statistics import NormalDist

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch

from dist_qft.errors import UserError
from dist_qft.quant.nf4 import BLOCKS, NF4, dynamic_map


def codebook() -> np.ndarray:
    """Normal quantiles between 1 - 0.9677083 and 0.9677083, 8 positive and 7 negative, around an exact zero."""
    quantile = np.vectorize(NormalDist().inv_cdf)
    positive = quantile(np.linspace(0.9677083, 0.5, 9)[:-1])
    negative = -quantile(np.linspace(0.9677083, 0.5, 8)[:-1])
    values = np.sort(np.concatenate([positive, negative, [0.0]]))
    return values / values.max()


def weight_of(rows: int, in_features: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, in_features, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", BLOCKS)
def test_is_bitsandbytes_bit_for_bit(block, dtype):
    shape = (6, 2 * block)
    weight = weight_of(*shape).to(dtype)
    codes, state = bnb.quantize_4bit(weight, blocksize=block, quant_type="nf4")
    packed = NF4(block).quantize(weight)
    assert torch.equal(packed["codes"].flatten(), codes.flatten())
    assert torch.equal(packed["absmax"].flatten(), state.absmax)
    assert torch.equal(NF4(block).dequantize(packed, shape, dtype), bnb.dequantize_4bit(codes, state))


@pytest.mark.parametrize("shape", [(1, 64), (3, 64), (300, 128), (2048, 576)])
def test_double_quantization_is_bitsandbytes_bit_for_bit(shape):
    weight = weight_of(*shape)
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    format = NF4(64, double_quant=True)
    packed = format.quantize(weight)
    assert torch.equal(packed["codes"].flatten(), codes.flatten())
    assert torch.equal(packed["absmax_codes"], state.absmax)
    assert torch.equal(packed["absmax_absmax"], state.state2.absmax)
    assert torch.equal(packed["absmax_offset"], state.offset.view(1))
    before = {name: tensor.clone() for name, tensor in packed.items()}
    for _ in range(2):  # twice: nothing may accumulate in the constants
        assert torch.equal(format.dequantize(packed, shape, torch.float32), bnb.dequantize_4bit(codes, state))
    assert all(torch.equal(packed[name], before[name]) for name in packed)


def test_the_map_of_the_constants_is_that_of_bitsandbytes_with_the_same_bits_on_every_cpu():
    """`torch.linspace` has other last bits on CPUs without fused multiply-add."""
    found = dynamic_map(torch.device("cpu"))
    torch.testing.assert_close(found, bnb.create_dynamic_map(), rtol=2e-7, atol=0.0)
    digest = "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"
    assert hashlib.sha256(found.numpy().tobytes()).hexdigest() == digest


@pytest.mark.parametrize("shape", [(1, 64), (9, 192)])
def test_against_the_papers_codebook_in_float64(shape):
    weight, values = weight_of(*shape, seed=1), codebook()
    packed = NF4().quantize(weight)
    nibbles = np.stack([packed["codes"].numpy() >> 4, packed["codes"].numpy() & 15], axis=-1).reshape(-1, 64)
    blocks = weight.double().numpy().reshape(-1, 64)
    absmax = np.abs(blocks).max(-1, keepdims=True)
    distance = np.abs((blocks / absmax)[..., None] - values)
    chosen = np.take_along_axis(distance, nibbles[..., None].astype(np.int64), axis=-1)[..., 0]
    assert (chosen - distance.min(-1)).max() < 1e-6
    restored = NF4().dequantize(packed, shape, torch.float64).numpy().reshape(-1, 64)
    np.testing.assert_allclose(restored, values[nibbles] * absmax, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("double_quant", [False, True])
def test_zero_blocks_come_back_as_zeros(double_quant):
    weight = weight_of(4, 128)
    weight[1, 64:] = 0.0
    weight[2] = 0.0
    format = NF4(64, double_quant)
    restored = format.dequantize(format.quantize(weight), (4, 128), torch.float32)
    assert torch.isfinite(restored).all()
    assert restored[2].abs().max() == 0 and restored[1, 64:].abs().max() == 0


def test_refuses_blocks_that_cross_rows_naming_the_legal_ones():
    with pytest.raises(UserError) as refused:
        NF4(128).check((576, 576), "model.layers.0.self_attn.q_proj")
    assert str(refused.value) == (
        "model.layers.0.self_attn.q_proj: nf4 block 128 does not divide in_features 576 "
        "of a weight of shape (576, 576); must be 32, 64"
    )
    assert refused.value.exit_code == 2
    with pytest.raises(UserError, match=r"; must be affine4, or exempt it"):
        NF4().quantize(torch.zeros(4, 100))
    with pytest.raises(UserError, match=r"quantization.block: got \[48\], must be one of 32, 64, 128, "):
        NF4(48)


def test_bitsandbytes_is_not_imported_before_it_is_needed():
    program = "import sys, dist_qft.quant.formats, dist_qft.quant.frozen; sys.exit('bitsandbytes' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_codes_at_the_boundaries_are_bitsandbytes_bit_for_bit():
    """Code values, the boundaries between them and the ends of the table's intervals, with their float neighbours."""
    values = bnb.get_4bit_type("nf4", "cpu")
    intervals = torch.arange(-(2**15), 2**15 + 1, dtype=torch.float64).div(2**15).float()
    hard = torch.cat([values, (values[1:] + values[:-1]) / 2, intervals, torch.tensor([1e-40, -1e-40, 1e-30, -0.0])])
    ends = torch.tensor([-2.0, 2.0])
    hard = torch.cat([hard, *(torch.nextafter(hard, end.expand_as(hard)) for end in ends)]).clamp_(-1, 1)
    for block, size in ((32, 1.0), (64, 1.0), (64, 0.0371), (32, 3e38), (32, 1e-38), (1024, 1e-42)):
        each = block - 1  # a block's largest comes first: it decides about the rest
        filled = torch.cat([hard, hard.new_zeros(-len(hard) % each)]).view(-1, each) * size
        weight = torch.cat([torch.full((len(filled), 1), size), filled], dim=1)
        codes, state = bnb.quantize_4bit(weight, blocksize=block, quant_type="nf4")
        packed = NF4(block).quantize(weight)
        assert torch.equal(packed["codes"].flatten(), codes.flatten())
        assert torch.equal(packed["absmax"].flatten(), state.absmax)


@pytest.mark.parametrize("seed", range(3))
def test_many_weights_are_bitsandbytes_bit_for_bit(seed):
    weight = weight_of(1024, 1536, seed)
    codes, _ = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(NF4(64).quantize(weight)["codes"].flatten(), codes.flatten())


@pytest.mark.parametrize("double_quant", [False, True])
def test_float16_on_a_cpu_is_float32_rounded_once(double_quant):
    """A kernel of bitsandbytes rounds what lies half-way between two of them upwards on some CPUs."""
    format, weight = NF4(64, double_quant=double_quant), weight_of(96, 1088, 0)
    packed = format.quantize(weight)
    exact = format.dequantize(packed, weight.shape, torch.float32)
    assert torch.equal(format.dequantize(packed, weight.shape, torch.float16), exact.half())
