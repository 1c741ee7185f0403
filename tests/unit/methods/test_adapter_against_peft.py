"""`qlora` against stock PEFT LoRA on dense and 4-bit bases, and the LoRA form of the other methods inside PEFT."""

import bitsandbytes as bnb
import peft
import pytest
import torch
from torch import nn

from dist_qft.config.methods.door import make_method
from dist_qft.methods.adapters.attach import AdapterSet
from dist_qft.methods.adapters.schedule import LinearShape, TileSettings, plan_adapters
from dist_qft.methods.adapters.tile_adapter import lora_factors

D_IN, D_OUT, RANK, ALPHA = 128, 64, 4, 10.0


def dense_base() -> nn.Module:
    return nn.Sequential(nn.Linear(D_IN, D_OUT)).requires_grad_(False)


def nf4_base() -> nn.Module:
    linear = bnb.nn.Linear4bit(D_IN, D_OUT, compute_dtype=torch.float32, quant_type="nf4")
    model = nn.Sequential(linear).to("cpu").requires_grad_(False)
    assert model[0].weight.dtype == torch.uint8
    return model


def peft_model(base: nn.Module, rank: int, alpha: float, a: torch.Tensor, b: torch.Tensor) -> nn.Module:
    """Stock PEFT LoRA on `base` with the given A and B."""
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["0"], r=rank, lora_alpha=alpha))
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.lora_A.default.weight.copy_(a)
        layer.lora_B.default.weight.copy_(b)
    return model


def random_adapters(**tile) -> AdapterSet:
    settings = TileSettings(in_features=D_IN, out_features=D_OUT, rank=RANK, alpha=ALPHA, **tile)
    adapters = AdapterSet.build({"0": settings}, seed=0)
    nn.init.normal_(adapters.by_path["0"].B, generator=torch.Generator().manual_seed(1))
    return adapters


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 7, D_IN, generator=torch.Generator().manual_seed(2)).requires_grad_()


@pytest.mark.parametrize("make_base", [dense_base, nf4_base])
def test_qlora_output_and_gradients_equal_peft(make_base, x):
    adapters = random_adapters(pool=1, repeat=1, inner=RANK)
    adapter = adapters.by_path["0"]
    base = make_base()
    with torch.no_grad():
        bare = base(x)
    handles = adapters.attach(base)
    ours = base(x)
    gradients = torch.autograd.grad(ours.square().sum(), (adapter.A, adapter.B, x))
    adapters.detach()
    assert len(handles) == 1

    theirs_model = peft_model(base, RANK, ALPHA, adapter.A, adapter.B)
    theirs = theirs_model(x)
    layer = theirs_model.base_model.model[0]
    expected = torch.autograd.grad(theirs.square().sum(), (layer.lora_A.default.weight, layer.lora_B.default.weight, x))

    assert (ours - bare).abs().max() > 0.1, "the adapter did nothing"
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for got, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("balance", [1, 2, 4])
def test_qbara_is_a_peft_lora_of_rank_balance_times_r(balance, x):
    adapters = random_adapters(pool=balance, repeat=balance, inner=balance * RANK)
    check_lora_form(adapters, x)


@pytest.mark.parametrize("pool_mode", ["mean", "sum"])
def test_qalora_is_a_peft_lora_of_rank_r(pool_mode, x):
    check_lora_form(random_adapters(pool=32, repeat=1, inner=RANK, pool_mode=pool_mode), x)


def check_lora_form(adapters: AdapterSet, x: torch.Tensor) -> None:
    base = dense_base()
    adapters.attach(base)
    ours = base(x)
    adapters.detach()
    adapter = adapters.by_path["0"]
    inner = adapter.settings.inner
    # PEFT scales by lora_alpha / r with its own r: the matrices' inner size.
    theirs = peft_model(base, inner, adapter.settings.scale * inner, *lora_factors(adapter))(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


def test_scale_and_initial_values_follow_the_same_law_as_peft():
    """Same Kaiming bound, same zero B, same alpha / r."""
    method = make_method(name="qlora", rank=RANK, alpha=ALPHA)
    plan = plan_adapters(method, [LinearShape("0", D_IN, D_OUT, 0)])
    adapter = AdapterSet.build(plan, seed=3).by_path["0"]
    model = peft.get_peft_model(dense_base(), peft.LoraConfig(target_modules=["0"], r=RANK, lora_alpha=ALPHA))
    theirs = model.base_model.model[0]
    assert adapter.settings.scale == theirs.scaling["default"]
    assert adapter.A.shape == theirs.lora_A.default.weight.shape
    assert adapter.B.shape == theirs.lora_B.default.weight.shape
    assert adapter.B.abs().max() == theirs.lora_B.default.weight.abs().max() == 0
    bound = D_IN**-0.5
    assert 0.9 * bound < adapter.A.abs().max() <= bound
    assert 0.9 * bound < theirs.lora_A.default.weight.abs().max() <= bound
