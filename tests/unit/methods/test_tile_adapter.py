"""The tile adapter against its exact dW in float64, against the papers' code, and its promises about the start."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from dist_qft.errors import UserError
from dist_qft.methods.adapters.schedule import TileSettings
from dist_qft.methods.adapters.tile_adapter import TileAdapter, exact_dW, lora_factors, tile_values
from dist_qft.methods.adapters.tiles import add_repeated, sum_neighbours

D_IN, D_OUT, RANK, ALPHA = 32, 48, 3, 5.0
METHODS = {
    "qlora": {"pool": 1, "repeat": 1, "inner": RANK},
    "qbara": {"pool": 2, "repeat": 2, "inner": 2 * RANK},
    "qbara balance 4": {"pool": 4, "repeat": 4, "inner": 4 * RANK},
    "qalora": {"pool": 8, "repeat": 1, "inner": RANK},
    "qahira": {"pool": 4, "repeat": 8, "inner": None},
    "qablora": {"pool": 4, "repeat": 8, "inner": RANK},
}


def random_adapter(dtype: torch.dtype = torch.float64, seed: int = 0, **changes) -> TileAdapter:
    """An adapter in mid-training: no matrix is zero."""
    fields = {"in_features": D_IN, "out_features": D_OUT, "rank": RANK, "alpha": ALPHA}
    adapter = TileAdapter(TileSettings(**{**fields, **changes})).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(generator=generator)
    return adapter


def random_input(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pool_mode", ["mean", "sum"])
@pytest.mark.parametrize("leading", [(7,), (2, 5), (2, 3, 4), ()], ids=["2-D", "3-D", "4-D", "1-D"])
def test_forward_is_base_plus_exact_dW(method, pool_mode, leading):
    adapter = random_adapter(**METHODS[method], pool_mode=pool_mode)
    x, y = random_input(*leading, D_IN), random_input(*leading, D_OUT, seed=2)
    before = y.clone()
    torch.testing.assert_close(adapter.add_to(y, x), y + x @ exact_dW(adapter).T, rtol=1e-12, atol=1e-12)
    assert torch.equal(y, before), "the base's output was changed in place"


@pytest.mark.parametrize("method", METHODS)
def test_exact_dW_is_constant_on_tiles_and_not_between_them(method):
    """Element by element from the definition, without the Kronecker product."""
    adapter = random_adapter(**METHODS[method])
    p, k = adapter.settings.pool, adapter.settings.repeat
    matrix = adapter.A if adapter.B is None else adapter.B @ adapter.A
    dW = exact_dW(adapter)
    assert dW.shape == (D_OUT, D_IN)
    for row, column in itertools.product(range(D_OUT), range(D_IN)):
        expected = ALPHA / RANK / p * matrix[row // k, column // p]
        assert dW[row, column].item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.equal(tile_values(adapter), dW[::k, ::p])
    assert len(tile_values(adapter).unique()) == D_OUT // k * D_IN // p


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pool_mode", ["mean", "sum"])
def test_gradients(method, pool_mode):
    adapter = random_adapter(in_features=16, out_features=16, **METHODS[method], pool_mode=pool_mode)
    x, y = random_input(2, 3, 16).requires_grad_(), random_input(2, 3, 16, seed=2).requires_grad_()

    def forward(y: torch.Tensor, x: torch.Tensor, *_parameters: torch.Tensor) -> torch.Tensor:
        return adapter.add_to(y, x)

    assert torch.autograd.gradcheck(forward, (y, x, *adapter.parameters()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("width", [D_IN, 4 * D_IN])  # the scale is on the narrower side
def test_gradients_without_a_graph_have_the_bits_of_autograd(method, width):
    adapter = random_adapter(torch.float32, **METHODS[method], in_features=width)
    x, gradient = torch.randn(2, 5, adapter.A.shape[1]), torch.randn(2, 5, [*adapter.parameters()][-1].shape[0])
    wanted = torch.autograd.grad(adapter.of_pooled(x, None, *adapter.parameters()), adapter.parameters(), gradient)
    assert all(map(torch.equal, adapter.gradients_of_pooled(x, gradient), wanted))


def test_forward_through_a_frozen_linear_trains_every_matrix_but_not_the_base():
    base = nn.Linear(D_IN, D_OUT, dtype=torch.float64).requires_grad_(False)
    adapter = random_adapter(**METHODS["qbara"])
    x = random_input(4, D_IN)
    adapter.add_to(base(x), x).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in adapter.parameters())
    assert base.weight.grad is None


def qalora_reference(x: torch.Tensor, adapter: TileAdapter) -> torch.Tensor:
    """QA-LoRA as its released code computes it: average pool over the group, then LoRA."""
    return F.linear(F.linear(nn.AvgPool1d(adapter.settings.pool)(x), adapter.A), adapter.B) * ALPHA / RANK


def qbara_reference(x: torch.Tensor, adapter: TileAdapter) -> torch.Tensor:
    """Q-BaRA as in arXiv 2407.17029's code: pool 2, A, B, each output copied to 2 neighbours."""
    result = F.linear(F.linear(nn.AvgPool1d(2)(x), adapter.A), adapter.B)
    return result.repeat_interleave(2, dim=2) * ALPHA / RANK


def qahira_reference(x: torch.Tensor, adapter: TileAdapter) -> torch.Tensor:
    """QA-HiRA in the same code: pool 4, one matrix, each output copied to 8 neighbours."""
    return F.linear(nn.AvgPool1d(4)(x), adapter.A).repeat_interleave(8, dim=2) * ALPHA / RANK


def qablora_reference(x: torch.Tensor, adapter: TileAdapter) -> torch.Tensor:
    """QA-BLoRA has no published code: the pair of the same code between QA-HiRA's pool and repeat."""
    result = F.linear(F.linear(nn.AvgPool1d(4)(x), adapter.A), adapter.B)
    return result.repeat_interleave(8, dim=2) * ALPHA / RANK


@pytest.mark.parametrize(
    ("method", "reference"),
    [
        ("qalora", qalora_reference),
        ("qbara", qbara_reference),
        ("qahira", qahira_reference),
        ("qablora", qablora_reference),
    ],
)
def test_equals_the_papers_code(method, reference):
    adapter, x = random_adapter(**METHODS[method]), random_input(2, 5, D_IN).requires_grad_()
    zero = torch.zeros(2, 5, D_OUT, dtype=torch.float64)
    inputs = (x, *adapter.parameters())
    ours, theirs = adapter.add_to(zero, x), reference(x, adapter)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    weights = random_input(2, 5, D_OUT, seed=3)
    for got, expected in zip(
        torch.autograd.grad((ours * weights).sum(), inputs),
        torch.autograd.grad((theirs * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_leaves_the_base_output_bit_for_bit_and_can_train(method, dtype):
    fields = dict(in_features=D_IN, out_features=D_OUT, rank=RANK, alpha=ALPHA, **METHODS[method])
    adapter = TileAdapter(TileSettings(**fields))
    x, y = random_input(2, 3, D_IN, dtype=dtype), random_input(2, 3, D_OUT, dtype=dtype, seed=2)
    output = adapter.add_to(y, x)
    assert torch.equal(output, y)
    assert exact_dW(adapter).abs().max() == 0
    output.sum().backward()
    assert max(parameter.grad.abs().max() for parameter in adapter.parameters()) > 0


def test_reset_is_a_function_of_the_generator_and_kaiming_like_peft():
    fields = {"in_features": 64, "out_features": 64, "pool": 2, "repeat": 2, "inner": 8, "rank": 4, "alpha": 1.0}
    adapter = TileAdapter(TileSettings(**fields))
    adapter.reset_parameters(torch.Generator().manual_seed(7))
    first = adapter.A.detach().clone()
    expected = torch.empty(8, 32)
    nn.init.kaiming_uniform_(expected, a=5**0.5, generator=torch.Generator().manual_seed(7))
    assert torch.equal(first, expected)
    assert first.abs().max() <= 32**-0.5
    adapter.reset_parameters(torch.Generator().manual_seed(8))
    assert not torch.equal(first, adapter.A)
    assert adapter.B.abs().max() == 0


@pytest.mark.parametrize("method", METHODS)
def test_use_rslora_divides_by_the_root_of_the_rank(method):
    """dW / M in float64, from matrices of which only the scale is unknown."""
    plain, scaled = (random_adapter(**METHODS[method], use_rslora=use) for use in (False, True))
    torch.testing.assert_close(exact_dW(scaled), exact_dW(plain) * RANK / RANK**0.5, rtol=1e-12, atol=0)
    assert scaled.settings.scale == ALPHA / 3**0.5
    x, y = random_input(5, D_IN), random_input(5, D_OUT, seed=2)
    torch.testing.assert_close(scaled.add_to(y, x), y + x @ exact_dW(scaled).T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "bound"),
    [
        ("qlora", RANK),
        ("qbara", 2 * RANK),
        ("qbara balance 4", 8),
        ("qalora", RANK),
        ("qahira", 6),
        ("qablora", RANK),
    ],
)
def test_rank_of_dW(method, bound):
    """QA-HiRA reaches min(d_out/k, d_in/p) = 6; Q-BaRA lambda * r, unless d_in / lambda = 8 is smaller."""
    assert torch.linalg.matrix_rank(exact_dW(random_adapter(**METHODS[method]))).item() == bound


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_compute_on_fp32_masters(method):
    adapter = random_adapter(torch.float32, **METHODS[method])
    x, y = random_input(2, 5, D_IN, dtype=torch.bfloat16), torch.zeros(2, 5, D_OUT, dtype=torch.bfloat16)
    output = adapter.add_to(y, x)
    assert output.dtype == torch.bfloat16
    exact = x.double() @ exact_dW(adapter).T
    assert (output.double() - exact).norm() / exact.norm() < 0.01
    output.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in adapter.parameters())


def test_output_keeps_the_dtype_of_the_base():
    adapter = random_adapter(torch.float32, **METHODS["qbara"])
    x, y = random_input(5, D_IN, dtype=torch.float32), torch.zeros(5, D_OUT, dtype=torch.bfloat16)
    assert adapter.add_to(y, x).dtype == torch.bfloat16


def test_dropout_is_on_the_pooled_input_and_off_in_eval():
    adapter = random_adapter(**METHODS["qahira"], dropout=0.5)
    x, y = random_input(4, 5, D_IN), torch.zeros(4, 5, D_OUT, dtype=torch.float64)
    torch.manual_seed(0)
    dropped = adapter.add_to(y, x)
    torch.manual_seed(0)
    pooled = F.dropout(nn.AvgPool1d(4)(x), 0.5)
    torch.testing.assert_close(dropped[..., ::8], F.linear(pooled, adapter.A) * ALPHA / RANK)
    torch.testing.assert_close(adapter.eval().add_to(y, x), x @ exact_dW(adapter).T)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "qlora"])
def test_backward_keeps_the_pooled_input_not_the_input(method):
    adapter = random_adapter(torch.float32, **METHODS[method])
    x, y = random_input(64, D_IN, dtype=torch.float32).requires_grad_(), torch.zeros(64, D_OUT)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        adapter.add_to(y, x)
    own = {parameter.data_ptr() for parameter in adapter.parameters()}
    widths = sorted(tensor.shape[-1] for tensor in kept if tensor.data_ptr() not in own)
    narrow = [D_IN // adapter.settings.pool] + ([adapter.settings.inner] if adapter.B is not None else [])
    assert widths == sorted(narrow)


@pytest.mark.parametrize("pool_mode", ["mean", "sum"])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "qahira"])
def test_lora_factors_multiply_to_dW(method, pool_mode):
    adapter = random_adapter(**METHODS[method], pool_mode=pool_mode)
    a, b = lora_factors(adapter)
    assert a.shape == (adapter.settings.inner, D_IN) and b.shape == (D_OUT, adapter.settings.inner)
    torch.testing.assert_close(b @ a * adapter.settings.scale, exact_dW(adapter), rtol=1e-12, atol=1e-12)


def test_a_single_matrix_has_no_lora_factors():
    with pytest.raises(UserError, match=r"single-matrix adapter \(qahira\) is not a LoRA pair") as caught:
        lora_factors(random_adapter(**METHODS["qahira"]))
    assert caught.value.exit_code == 2


@settings(max_examples=60, deadline=None)
@given(
    pool=st.integers(1, 5),
    repeat=st.integers(1, 5),
    tiles_in=st.integers(1, 6),
    tiles_out=st.integers(1, 6),
    inner=st.none() | st.integers(1, 7),
    rank=st.integers(1, 9),
    alpha=st.floats(0.1, 64),
    pool_mode=st.sampled_from(["mean", "sum"]),
    leading=st.lists(st.integers(0, 3), max_size=3),
)
def test_any_tile_adapter_is_its_dW(pool, repeat, tiles_in, tiles_out, inner, rank, alpha, pool_mode, leading):
    d_in, d_out = pool * tiles_in, repeat * tiles_out
    tile = {"pool": pool, "repeat": repeat, "inner": inner, "pool_mode": pool_mode}
    adapter = random_adapter(in_features=d_in, out_features=d_out, rank=rank, alpha=alpha, **tile)
    x, y = random_input(*leading, d_in), random_input(*leading, d_out, seed=2)
    torch.testing.assert_close(adapter.add_to(y, x), y + x @ exact_dW(adapter).T, rtol=1e-10, atol=1e-10)
    assert adapter.settings.parameters == sum(parameter.numel() for parameter in adapter.parameters())
    assert TileSettings.from_dict(adapter.settings.to_dict()) == adapter.settings


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_pooling_and_repeating_are_their_plain_forms(count, dtype):
    """Forward and backward, beside repeat_interleave and a sum in float64."""
    generator = torch.Generator().manual_seed(count)
    x, y = (torch.randn(3, 5, 48, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    values = torch.randn(3, 5, 48 // count, generator=generator).to(dtype).requires_grad_()
    ours = [sum_neighbours(x, count), add_repeated(y, values, count)]
    exact = [
        x.double().unflatten(-1, (-1, count)).sum(-1),
        y.double() + values.double().repeat_interleave(count, dim=-1),
    ]
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 8e-3}[dtype]
    for mine, reference in zip(ours, exact, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), reference, rtol=tolerance, atol=tolerance)
        weights = torch.randn(reference.shape, generator=generator).to(dtype)
        found = torch.autograd.grad((mine * weights).sum(), (x, y, values), allow_unused=True)
        wanted = torch.autograd.grad((reference * weights).sum(), (x, y, values), allow_unused=True)
        assert [value is None for value in found] == [value is None for value in wanted]
        for gradient, expected in zip(found, wanted, strict=True):
            if expected is not None:
                torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=tolerance)
