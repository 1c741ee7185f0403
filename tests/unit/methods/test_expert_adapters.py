"""Adapters of a mixture's experts: each expert's rows get the update that an adapter of its own would give them."""

import pytest
import torch
from torch import nn

from dist_qft.config.methods.door import make_method
from dist_qft.errors import UserError
from dist_qft.methods.adapters.attach import AdapterSet
from dist_qft.methods.adapters.exact_fold import tile_rows
from dist_qft.methods.adapters.schedule import LinearShape, TileSettings, plan_adapters
from dist_qft.methods.adapters.tile_adapter import TileAdapter, exact_dW, tile_values

D_IN, D_OUT, EXPERTS, RANK = 16, 24, 5, 3
SIZES = [3, 0, 4, 0, 1]  # two experts have no rows; two rows more belong to none
ROWS = sum(SIZES) + 2
METHODS = {
    "qlora": {"pool": 1, "repeat": 1, "inner": RANK},
    "qbara": {"pool": 2, "repeat": 2, "inner": 2 * RANK},
    "qahira": {"pool": 4, "repeat": 8, "inner": None},
    "qablora": {"pool": 4, "repeat": 8, "inner": RANK},
}
each_method = pytest.mark.parametrize("method", METHODS)


def expert_adapter(method: str) -> TileAdapter:
    settings = TileSettings(
        in_features=D_IN, out_features=D_OUT, rank=RANK, alpha=5.0, experts=EXPERTS, **METHODS[method]
    )
    adapter = TileAdapter(settings).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(generator=generator)
    return adapter


def own_adapters(adapter: TileAdapter) -> list[TileAdapter]:
    """For each expert an adapter of a linear layer with its values."""
    found = []
    for expert in range(EXPERTS):
        single = TileAdapter(adapter.settings.model_copy(update={"experts": None})).double()
        for name, parameter in single.named_parameters():
            rows = slice(expert * len(parameter), (expert + 1) * len(parameter))
            parameter.data.copy_(getattr(adapter, name).data[rows])
        found.append(single)
    return found


def tensors(*shapes: tuple[int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]


@each_method
def test_each_row_gets_its_experts_update_and_gradient(method):
    adapter = expert_adapter(method)
    singles = own_adapters(adapter)
    y, x, direction = tensors((ROWS, D_OUT), (ROWS, D_IN), (ROWS, D_OUT))
    result = adapter.add_to(y, x, SIZES)
    parts = zip(y.split([*SIZES, 2]), x.split([*SIZES, 2]), strict=True)
    expected = [single.add_to(*part) for single, part in zip(singles, parts, strict=False)] + [y[-2:]]
    torch.testing.assert_close(result, torch.cat(expected), rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad((result * direction).sum(), [x, *adapter.parameters()])
    names = [name for name, _ in adapter.named_parameters()]
    values = [getattr(single, name) for name in names for single in singles]
    wanted = torch.autograd.grad((torch.cat(expected) * direction).sum(), [x, *values], materialize_grads=True)
    stacked = [torch.cat(wanted[1 + n * EXPERTS :][:EXPERTS]) for n in range(len(names))]
    torch.testing.assert_close(list(gradients), [wanted[0], *stacked], rtol=1e-12, atol=1e-12)
    for expert, size in enumerate(SIZES):
        for gradient in gradients[1:]:
            assert bool(gradient.chunk(EXPERTS)[expert].any()) == bool(size)


@each_method
def test_merge_aware_gradients_are_those_of_the_added_update(method):
    adapter = expert_adapter(method)
    y, x, direction = tensors((ROWS, D_OUT), (ROWS, D_IN), (ROWS, D_OUT))
    added, straight = adapter.add_to(y, x, SIZES), adapter.add_gradient_to(y, x, SIZES)
    assert torch.equal(straight, y)
    wanted, found = (
        torch.autograd.grad((result * direction).sum(), list(adapter.parameters())) for result in (added, straight)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@each_method
def test_dW_is_that_of_each_expert_below_the_other(method):
    adapter = expert_adapter(method)
    assert torch.equal(exact_dW(adapter), torch.cat([exact_dW(single) for single in own_adapters(adapter)]))
    values = tile_values(adapter)
    for start, stop in [(0, len(values)), (1, 2), (D_OUT // adapter.settings.repeat - 1, len(values) - 1)]:
        torch.testing.assert_close(tile_rows(adapter, start, stop), values[start:stop], rtol=1e-14, atol=1e-14)


def shapes() -> list[LinearShape]:
    inside = [("mlp.experts.gate_up_proj", D_IN, 2 * D_OUT, EXPERTS), ("mlp.experts.down_proj", D_OUT, D_IN, EXPERTS)]
    layers = [("self_attn.q_proj", D_IN, D_IN, None), *inside, ("mlp.shared_expert.down_proj", D_OUT, D_IN, None)]
    return [
        LinearShape(f"model.layers.{depth}.{name}", d_in, d_out, depth, experts)
        for depth in range(2)
        for name, d_in, d_out, experts in layers
    ]


@pytest.mark.parametrize(
    ("targets", "selected"),
    [
        ("all", ["self_attn.q_proj", "mlp.shared_expert.down_proj"]),
        ("down_proj", ["mlp.shared_expert.down_proj"]),
        ("mlp", ["mlp.shared_expert.down_proj"]),
        ("experts", ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
        (["q_proj", "experts.down_proj"], ["self_attn.q_proj", "mlp.experts.down_proj"]),
    ],
)
def test_experts_are_selected_by_their_own_name_alone(targets, selected):
    tiles = plan_adapters(make_method(name="qlora", rank=4, targets=targets), shapes())
    assert list(tiles) == [f"model.layers.{depth}.{name}" for depth in range(2) for name in selected]
    for path, settings in tiles.items():
        assert settings.experts == (EXPERTS if ".experts." in path else None)
        assert settings.parameters == (settings.experts or 1) * 4 * (settings.in_features + settings.out_features)


def test_a_schedule_changes_experts():
    rules = [{"layers": ["experts"], "rank": 2}, {"layers": ["experts.down_proj"], "depth": [0, 0], "skip": True}]
    tiles = plan_adapters(make_method(name="qlora", rank=4, targets=["all", "experts"], schedule=rules), shapes())
    ranks = {path.removeprefix("model.layers."): settings.rank for path, settings in tiles.items()}
    assert ranks["0.mlp.experts.gate_up_proj"] == ranks["1.mlp.experts.down_proj"] == 2
    assert "0.mlp.experts.down_proj" not in ranks and ranks["0.self_attn.q_proj"] == 4


@pytest.mark.parametrize("experts", [None, EXPERTS + 1])
def test_an_adapter_of_another_number_of_experts_does_not_fit(experts):
    module = nn.Linear(D_IN, D_OUT)
    module.experts = EXPERTS
    settings = expert_adapter("qlora").settings.model_copy(update={"experts": experts})
    with pytest.raises(UserError, match=f"0 has {EXPERTS} experts, the adapter {experts or 'none'}"):
        AdapterSet({"0": TileAdapter(settings)}).attach(nn.Sequential(module))


def test_settings_are_stored_and_read():
    settings = expert_adapter("qbara").settings
    assert TileSettings.from_dict(settings.to_dict()) == settings
    assert "experts" not in settings.model_copy(update={"experts": None}).to_dict()
