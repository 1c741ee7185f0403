"""Inputs that are made again for a gradient: which ones, with what bits, and what is kept then."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from dist_qft.methods.adapters.fused_update import Update, add_update
from dist_qft.methods.adapters.recomputed import recomputation
from dist_qft.methods.adapters.schedule import TileSettings
from dist_qft.methods.adapters.tile_adapter import TileAdapter

WIDTH, OUT = 32, 48


def states(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()


def norm(kind: type[nn.Module], dtype: torch.dtype) -> nn.Module:
    module = kind(WIDTH).requires_grad_(False).to(dtype)
    nn.init.normal_(module.weight, std=0.3)
    return module


CASES = {
    "gated": lambda x: F.silu(x * 1.5) * (x + 1),
    "gated by gelu": lambda x: (x + 1) * F.gelu(x - 1, approximate="tanh"),
    "silu": lambda x: F.silu(x - 1),
    "gelu": lambda x: F.gelu(x + 1),
    "llama's norm": lambda x: norm(LlamaRMSNorm, x.dtype)(x + 1),
    "gemma's norm": lambda x: norm(GemmaRMSNorm, x.dtype)(x + 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_what_one_step_makes_is_made_again_bit_for_bit(case, dtype):
    torch.manual_seed(0)
    x = CASES[case](states(dtype))
    again = recomputation(x)
    assert again is not None
    with torch.no_grad():
        assert torch.equal(again(), x) and again().dtype == dtype


@pytest.mark.parametrize(
    "made",
    [
        lambda x: x,
        lambda x: x.detach() * 2,
        lambda x: x + 1,
        lambda x: F.softmax(x, -1),
        lambda x: F.silu(x).transpose(0, 1),
        lambda x: (x + 1).chunk(2, -1)[1],
        lambda x: F.linear(x, torch.ones(WIDTH, WIDTH)) * torch.ones(WIDTH),  # only the weight is kept of it
    ],
    ids=["leaf", "no gradient", "sum", "softmax", "view", "chunk", "frozen factor"],
)
def test_all_else_is_kept(made):
    assert recomputation(made(states())) is None


def adapters(inner: int | None, dropout: float = 0.0) -> list[TileAdapter]:
    """The same adapter twice; the second makes its inputs again."""
    sizes = {"in_features": WIDTH, "out_features": OUT, "inner": inner, "rank": 4, "alpha": 6.0, "dropout": dropout}
    pair = [TileAdapter(TileSettings(**sizes, pool=1, repeat=1)) for _ in range(2)]
    for adapter in pair:
        generator = torch.Generator().manual_seed(1)
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, generator=generator)
    pair[1].makes_inputs_again = True
    return pair


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inner", [4, 40, None], ids=["narrow", "wide", "single matrix"])
def test_an_update_has_the_bits_of_one_that_keeps_its_input(inner, dtype):
    found = []
    for adapter in adapters(inner):
        x = states(dtype)
        y = adapter.add_to(torch.zeros(2, 5, OUT, dtype=dtype), CASES["gated"](x))
        gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        found.append([y, *torch.autograd.grad(y, [x, *adapter.parameters()], gradient)])
    assert all(map(torch.equal, *found))
    assert [each.dtype for each in found[0]] == [each.dtype for each in found[1]]


@pytest.mark.parametrize("inner", [4, None], ids=["pair", "single matrix"])
def test_an_update_in_place_may_make_its_input_again(inner):
    found = []
    for adapter in adapters(inner):
        x = states()
        wide = CASES["gated"](x)
        update = Update(adapter.A, adapter.B, None, adapter.settings.tile_scale, 1, 1)
        again = recomputation(wide) if adapter.makes_inputs_again else None
        y = add_update(torch.zeros(2, 5, OUT).requires_grad_().clone(), wide, update, again=again)
        found.append([y, *torch.autograd.grad(y, [x, *adapter.parameters()], torch.ones_like(y))])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_input_is_not_kept_unless_values_were_dropped(dropout):
    kept: list[torch.Size] = []
    for adapter in adapters(4, dropout):
        x = CASES["gated"](states())

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor.shape)
            return tensor

        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            adapter.add_to(torch.zeros(2, 5, OUT), x)
        inputs = [shape for shape in kept if shape.numel() == x.numel()]
        assert bool(inputs) == (dropout > 0 or not adapter.makes_inputs_again)
