"""Products of a few rows with packed nf4 weights, by bitsandbytes' kernel: values on a CPU, whose implementation of the
operator takes the same arguments, and the choice of it on CUDA tensors without values.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("bitsandbytes")
pytest.importorskip("triton")

from dist_qft.quant.experts import FrozenExperts
from dist_qft.quant.formats import NF4, Affine4, Dense, Format
from dist_qft.quant.frozen import FrozenLinear
from dist_qft.quant.nf4 import codebook, codebook_on, dynamic_map
from tests.support.fake_cuda import DEVICE, fake_cuda

FORMATS = [NF4(), NF4(32, double_quant=True)]
FUSED = "bitsandbytes::gemm_4bit"

each_format = pytest.mark.parametrize("format", FORMATS, ids=str)


@pytest.fixture(autouse=True)
def tables_of_this_test():
    """Tables are kept per device, and fake ones belong to one mode."""
    yield
    dynamic_map.cache_clear()
    codebook_on.cache_clear()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@each_format
@pytest.mark.parametrize("shape", [(1056, 544), (64, 64), (32, 160)], ids=str)
@pytest.mark.parametrize("leading", [(1,), (2, 1), (4,), ()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_of_the_dequantized_weight(format, shape, leading, dtype):
    if shape[1] % format.block:
        format = NF4(32, format.double_quant)
    packed = format.quantize(random(*shape) * 3 + 0.5)
    x, bias = random(*leading, shape[1], seed=1).to(dtype), random(shape[0], seed=2).to(dtype)
    assert 0 < x.shape[:-1].numel() <= format.few_rows(dtype)
    product = format.product(packed, shape, x, bias)
    assert product.dtype == dtype and product.shape == (*leading, shape[0])
    exact = x.double() @ format.dequantize(packed, shape, torch.float64).T + bias.double()
    error = (product.double() - exact).norm() / exact.norm()
    assert error < (1e-6 if dtype == torch.float32 else 5e-3)
    assert torch.equal(product, F.linear(x, format.dequantize(packed, shape, dtype), bias))
    assert torch.equal(format.product(packed, shape, x, None), F.linear(x, format.dequantize(packed, shape, dtype)))


def test_the_kernel_loads_16_bytes_at_once(monkeypatch):
    """A slice of a wider activation may begin at any value, a row of codes at any byte."""
    taken = []
    monkeypatch.setattr("bitsandbytes.matmul_4bit", lambda x, codes, state, bias: taken.append((x, codes)))
    format, wide = NF4(32), random(1, 67, seed=1)
    packed = format.quantize(random(8, 64))
    held = torch.empty(8 * 32 + 1, dtype=torch.uint8)
    held[1:] = packed["codes"].flatten()
    format.product({**packed, "codes": held[1:].view(8, 32)}, (8, 64), wide[:, 3:], None)
    ((x, codes),) = taken
    assert x.data_ptr() % 16 == codes.data_ptr() % 16 == 0 and x.is_contiguous() and codes.is_contiguous()
    assert torch.equal(x, wide[:, 3:]) and torch.equal(codes.flatten(), packed["codes"].flatten())


@each_format
def test_the_kernel_is_told_the_values_of_the_codes(format, monkeypatch):
    """bitsandbytes 0.49 takes them from the state."""
    states = []
    monkeypatch.setattr("bitsandbytes.matmul_4bit", lambda x, codes, state, bias: states.append(state))
    format.product(format.quantize(random(8, 64)), (8, 64), random(1, 64), None)
    (state,) = states
    assert state.code.shape == (16,) and torch.equal(state.code, codebook())


@pytest.mark.parametrize("double_quant", [False, True])
def test_experts(double_quant):
    experts, sizes = FrozenExperts(3, 64, 24, NF4(32, double_quant), torch.float32, device="cpu"), [2, 0, 1]
    for name, tensor in experts.format.quantize(random(72, 64)).items():
        setattr(experts, name, nn.Parameter(tensor, requires_grad=False))
    x = random(5, 64, seed=1)
    torch.testing.assert_close(experts.products_of_few(x, sizes), experts(x, sizes))


def kernels(module: FrozenLinear | FrozenExperts, *given, gradient: bool = False) -> dict[str, int]:
    """The kernels that a module launches for its arguments, on a GPU that is not there."""
    with fake_cuda() as counts, torch.set_grad_enabled(gradient):
        module.to(DEVICE)
        x = torch.empty(given[0], dtype=module.dtype, device=DEVICE)
        dynamic_map(DEVICE), codebook_on(DEVICE)  # copied to the device once
        counts.take()
        module(x, *given[1:])
        return dict(counts.take().kernels)


@each_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tokens_are_generated_by_one_kernel_per_layer(format, dtype):
    layer = FrozenLinear(128, 48, format, True, dtype)
    for shape in ((1, 1, 128), (4, 1, 128), (3, 128)):
        assert kernels(layer, shape) == {FUSED: 1}, shape
    for shape in ((1, 5, 128), (0, 128)):
        assert FUSED not in kernels(layer, shape), shape
    assert FUSED not in kernels(layer, (1, 1, 128), gradient=True)


@pytest.mark.parametrize("format", [Affine4(), Dense()], ids=str)
def test_other_formats_dequantize(format: Format):
    assert FUSED not in kernels(FrozenLinear(128, 48, format, True, torch.bfloat16), (1, 1, 128))


@each_format
def test_experts_multiply_their_few_rows(format):
    experts = FrozenExperts(3, 64, 24, format, torch.bfloat16)
    assert kernels(experts, (8, 64), [4, 0, 1])[FUSED] == 2
    assert FUSED not in kernels(experts, (8, 64), [5, 0, 1])


def test_cpus_dequantize(monkeypatch):
    monkeypatch.setattr(NF4, "product", None)
    layer = FrozenLinear(128, 48, NF4(), False, torch.float32, "cpu")
    with torch.no_grad():
        assert layer(torch.zeros(1, 128)).shape == (1, 48)
