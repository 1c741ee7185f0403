"""Packed stacks of experts against a plain loop over their dequantized weights, in float64."""

import pytest
import torch

from dist_qft.errors import UserError
from dist_qft.quant.experts import FrozenExperts
from dist_qft.quant.formats import NF4, Affine4, Dense, Format

EXPERTS, OUT, IN = 5, 24, 64
SIZES = [3, 0, 4, 0, 1]  # two experts have no rows; two rows more belong to none
FORMATS = {
    "nf4": NF4(32),
    "nf4 twice": NF4(32, double_quant=True),
    "affine4": Affine4((8, 4)),
    "dense": Dense(),
}


def stack(format: Format) -> FrozenExperts:
    module = FrozenExperts(EXPERTS, IN, OUT, format, torch.float64, device="cpu")
    weight = torch.randn(EXPERTS * OUT, IN, generator=torch.Generator().manual_seed(0))
    for name, tensor in format.quantize(weight).items():
        getattr(module, name).data = tensor.to(getattr(module, name).dtype)
    return module


def rows() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(sum(SIZES) + 2, IN, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_products_and_gradients(format):
    module, x = stack(format), rows()
    weights = module.dequantize().view(EXPERTS, OUT, IN)
    pieces = [piece @ weight.T for piece, weight in zip(x.split([*SIZES, 2])[:-1], weights, strict=True)]
    expected = torch.cat([*pieces, torch.zeros(2, OUT, dtype=torch.float64)])
    product = module(x, SIZES)
    torch.testing.assert_close(product, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(product)
    (gradient,) = torch.autograd.grad((product * direction).sum(), x)
    (wanted,) = torch.autograd.grad((expected * direction).sum(), x)
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-12)
    assert not gradient[sum(SIZES) :].any()


def test_only_experts_with_rows_are_converted_and_nothing_is_saved():
    module, x, converted, saved = stack(FORMATS["nf4"]), rows(), [], []
    one_expert = module._rows_of

    def counted(packed: dict[str, torch.Tensor], start: int, stop: int) -> torch.Tensor:
        converted.append((start // OUT, stop - start))
        return one_expert(packed, start, stop)

    module._rows_of = counted
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        product = module(x, SIZES)
    assert converted == [(0, OUT), (2, OUT), (4, OUT)]
    assert saved == []
    converted.clear()
    product.sum().backward()
    assert converted == [(0, OUT), (2, OUT), (4, OUT)]


def test_no_block_crosses_two_experts():
    """120 rows in all are a multiple of 10, one expert's 24 are not."""
    with pytest.raises(UserError, match="10 does not divide out_features 24"):
        FrozenExperts(EXPERTS, IN, OUT, Affine4((10, 4)), torch.float32)
