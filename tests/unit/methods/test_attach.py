"""Adapters on a base from outside: hooks, order, reproducible starts, and refusals that name the layer."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dist_qft.errors import UserError
from dist_qft.methods.adapters.attach import AdapterSet
from dist_qft.methods.adapters.schedule import TileSettings
from dist_qft.methods.adapters.tile_adapter import TileAdapter, exact_dW

WIDTH = 16
PATHS = ["layers.0.self_attn.q_proj", "layers.0.mlp.up_proj", "layers.1.self_attn.q_proj", "layers.1.mlp.up_proj"]
QBARA = TileSettings(in_features=WIDTH, out_features=WIDTH, pool=2, repeat=2, rank=2, alpha=4.0, inner=4)
QAHIRA = QBARA.model_copy(update={"inner": None})
PLAN = {path: QBARA if "q_proj" in path else QAHIRA for path in PATHS}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({"q_proj": nn.Linear(WIDTH, WIDTH)})
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(WIDTH, WIDTH)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp["up_proj"](torch.tanh(self.self_attn["q_proj"](x)))


class Base(nn.Module):
    """Two layers with the module paths of a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x: torch.Tensor, recompute: bool = False) -> torch.Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        return x


@pytest.fixture
def base() -> Base:
    torch.manual_seed(0)
    return Base().double().requires_grad_(False)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def trained(seed: int = 0) -> AdapterSet:
    """Adapters away from their zero start."""
    adapters = AdapterSet.build(PLAN, seed).double()
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in adapters.named_tensors():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return adapters


def test_the_hooked_base_computes_with_weight_plus_dW(base, x):
    adapters = trained()
    merged = Base().double()
    merged.load_state_dict(base.state_dict())
    with torch.no_grad():
        for path, adapter in adapters.by_path.items():
            merged.get_submodule(path).weight += exact_dW(adapter)
    adapters.attach(base)
    torch.testing.assert_close(base(x), merged(x), rtol=1e-12, atol=1e-12)


def test_detach_and_disabled_restore_the_base_bit_for_bit(base, x):
    bare, adapters = base(x), trained()
    handles = adapters.attach(base)
    assert len(handles) == len(PLAN)
    adapted = base(x)
    assert not torch.allclose(adapted, bare)
    with adapters.disabled():
        assert torch.equal(base(x), bare)
        with adapters.disabled():
            pass
        assert torch.equal(base(x), bare), "the inner block switched the adapters on"
    assert torch.equal(base(x), adapted)
    with pytest.raises(KeyError), adapters.disabled():
        raise KeyError
    assert torch.equal(base(x), adapted), "an exception left the adapters off"
    adapters.detach()
    assert torch.equal(base(x), bare)
    adapters.attach(base)
    assert torch.equal(base(x), adapted)


def test_a_fresh_set_starts_at_the_base_and_is_no_part_of_it(base, x):
    bare, names = base(x), list(base.state_dict())
    modules = list(base.modules())
    AdapterSet.build(PLAN, seed=0).double().attach(base)
    assert torch.equal(base(x), bare)
    assert list(base.state_dict()) == names
    assert list(base.modules()) == modules


def test_gradients_reach_every_adapter_also_when_layers_are_recomputed(base, x):
    adapters = trained()
    adapters.attach(base)
    parameters = [parameter for _, parameter in adapters.named_tensors()]
    direct = torch.autograd.grad(base(x).square().sum(), parameters)
    recomputed = torch.autograd.grad(base(x, recompute=True).square().sum(), parameters)
    for one, other in zip(direct, recomputed, strict=True):
        assert one.abs().max() > 0
        assert torch.equal(one, other)


def test_names_follow_the_plan_with_A_before_B():
    assert [name for name, _ in AdapterSet.build(PLAN, seed=0).named_tensors()] == [
        "layers.0.self_attn.q_proj.A",
        "layers.0.self_attn.q_proj.B",
        "layers.0.mlp.up_proj.A",
        "layers.1.self_attn.q_proj.A",
        "layers.1.self_attn.q_proj.B",
        "layers.1.mlp.up_proj.A",
    ]


def test_named_tensors_are_all_of_the_trainables():
    adapters = AdapterSet.build(PLAN, seed=0)
    named = [parameter for _, parameter in adapters.named_tensors()]
    assert {id(parameter) for parameter in named} == {id(parameter) for parameter in adapters.parameters()}
    assert sum(parameter.numel() for parameter in named) == sum(tile.parameters for tile in PLAN.values())
    assert all(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in named)


def test_start_values_depend_on_seed_and_path_alone():
    whole = dict(AdapterSet.build(PLAN, seed=5).named_tensors())
    torch.manual_seed(99)
    reverse = dict(AdapterSet.build({path: PLAN[path] for path in reversed(PATHS)}, seed=5).named_tensors())
    alone = dict(AdapterSet.build({PATHS[2]: QBARA}, seed=5).named_tensors())
    other = dict(AdapterSet.build(PLAN, seed=6).named_tensors())
    for name, value in whole.items():
        assert torch.equal(reverse[name], value)
    name = f"{PATHS[2]}.A"
    assert torch.equal(alone[name], whole[name])
    assert not torch.equal(other[name], whole[name])
    assert not torch.equal(whole[f"{PATHS[0]}.A"], whole[name])


def test_building_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    AdapterSet.build(PLAN, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_load_tensors_copies_in_place(base, x):
    source, target = trained(1), AdapterSet.build(PLAN, seed=0).double()
    storage = [parameter.data_ptr() for _, parameter in target.named_tensors()]
    target.load_tensors(dict(source.named_tensors()))
    assert [parameter.data_ptr() for _, parameter in target.named_tensors()] == storage
    source.attach(base)
    expected = base(x)
    source.detach()
    target.attach(base)
    assert torch.equal(base(x), expected)


def test_load_tensors_names_every_misfit_and_changes_nothing():
    adapters = trained()
    before = {name: parameter.detach().clone() for name, parameter in adapters.named_tensors()}
    wrong = {name: torch.zeros_like(value) for name, value in before.items()}
    del wrong["layers.0.self_attn.q_proj.B"]
    wrong["layers.7.mlp.up_proj.A"] = torch.zeros(1)
    wrong["layers.1.mlp.up_proj.A"] = torch.zeros(8, 9)
    wrong["layers.0.mlp.up_proj.A"] = torch.zeros(8, 8, dtype=torch.int8)
    with pytest.raises(UserError) as caught:
        adapters.load_tensors(wrong)
    assert caught.value.exit_code == 2
    assert str(caught.value) == (
        "adapter tensors do not fit: missing layers.0.self_attn.q_proj.B; unexpected layers.7.mlp.up_proj.A; "
        "layers.0.mlp.up_proj.A has dtype torch.int8, must be a floating-point type; "
        "layers.1.mlp.up_proj.A has shape [8, 9], must be [8, 8]"
    )
    assert all(torch.equal(parameter, before[name]) for name, parameter in adapters.named_tensors())


def test_attach_names_every_layer_that_does_not_fit_and_hooks_nothing(base, x):
    bare = base(x)
    wide = QBARA.model_copy(update={"in_features": 32})
    plan = {PATHS[0]: QBARA, "layers.2.mlp.up_proj": QBARA, PATHS[1]: wide, "layers.0.mlp": QBARA}
    with pytest.raises(UserError) as caught:
        AdapterSet.build(plan, seed=0).attach(base)
    assert caught.value.exit_code == 2
    assert str(caught.value) == (
        "adapters do not fit this model: layers.2.mlp.up_proj does not exist; "
        "layers.0.mlp.up_proj maps 16 -> 16, the adapter 32 -> 16; layers.0.mlp is a ModuleDict, not a linear layer"
    )
    assert torch.equal(base(x), bare)
    assert not any(module._forward_hooks for module in base.modules())


def test_no_adapters_is_an_error():
    with pytest.raises(UserError, match="no layer has an adapter, there is nothing to train") as caught:
        AdapterSet.build({}, seed=0)
    assert caught.value.exit_code == 2


def test_attaching_twice_would_add_twice_and_is_refused(base):
    adapters = AdapterSet({PATHS[0]: TileAdapter(QBARA)})
    adapters.attach(base)
    with pytest.raises(RuntimeError, match="already attached"):
        adapters.attach(base)


def test_training_moves_the_adapters_and_not_the_base(base, x):
    """Every method's start can be left: the loss falls on a fixed target, the base keeps its bits."""
    adapters = AdapterSet.build(PLAN, seed=0).double()
    adapters.attach(base)
    frozen = {name: value.clone() for name, value in base.state_dict().items()}
    target = torch.roll(x, 1, dims=-1)
    optimizer = torch.optim.AdamW([parameter for _, parameter in adapters.named_tensors()], lr=0.02)
    losses = []
    for _ in range(40):
        loss = (base(x) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(value, frozen[name]) for name, value in base.state_dict().items())
