"""MXFP4 and NVFP4: every code under every kind of block scale, against the definition in float64."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dist_qft.quant.codebook4 import Codebook4

ROWS, COLUMNS = 6, 256


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """So many threads of PyTorch; the lookup is another operator with more than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def e2m1(code: Tensor) -> Tensor:
    """The value of 4 bits: sign, two of exponent (bias 1), one of mantissa; float64."""
    sign, exponent, mantissa = 1 - 2 * (code >> 3).double(), (code >> 1 & 3).double(), (code & 1).double()
    return sign * torch.where(exponent == 0, mantissa / 2, 2 ** (exponent - 1) * (1 + mantissa / 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4", "nvfp4-divided"])
def test_values_are_the_definition(kind, dtype, threads):
    format = Codebook4(kind)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(256, (ROWS, COLUMNS // 2), dtype=torch.uint8, generator=generator)
    blocks = (ROWS, COLUMNS // format.block)
    packed = {"codes": codes}
    if kind == "mxfp4":
        packed["scale"] = torch.randint(100, 150, blocks, dtype=torch.uint8, generator=generator)
        packed["scale"][0, 0], packed["scale"][1, 1] = 0, 254
        scale = 2.0 ** (packed["scale"].double() - 127)
    else:
        packed["scale"] = (torch.rand(blocks, generator=generator) * 400 - 200).to(torch.float8_e4m3fn)
        packed["global"] = torch.tensor([0.37])
        factor = packed["global"].double()
        scale = packed["scale"].double() * (factor if kind == "nvfp4" else 1 / factor)
        scale = scale.float().double()  # the library's own rounding
    values = e2m1(torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1))
    exact = (values.unflatten(1, (-1, format.block)) * scale.unsqueeze(-1)).flatten(1)
    assert torch.equal(format.dequantize(packed, (ROWS, COLUMNS), dtype), exact.float().to(dtype))


def test_a_scale_that_is_no_number_stays_none(threads):
    packed = {"codes": torch.full((1, 16), 0x22, dtype=torch.uint8), "scale": torch.full((1, 1), 255).byte()}
    assert Codebook4("mxfp4").dequantize(packed, (1, 32), torch.float32).isnan().all()
