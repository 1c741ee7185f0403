"""The chunked loss and its gradient against torch's cross entropy on full float64 logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dist_qft.base_model import loss as loss_module
from dist_qft.base_model.loss import IGNORED, LogitMap, slice_rows, token_cross_entropy, token_loss

MAPS = {
    "plain": LogitMap(),
    "gemma2": LogitMap(cap=30.0),
    "cohere": LogitMap(scale=0.0625),
    "granite with a cap": LogitMap(scale=1 / 8, cap=5.0),
}
TOKENS, DIM, VOCABULARY = 13, 24, 101

each_map = pytest.mark.parametrize("logit_map", MAPS.values(), ids=MAPS.keys())


def summed_cross_entropy(*args, **settings) -> tuple[Tensor, Tensor | None]:
    losses, gradient = token_cross_entropy(*args, **settings)
    return losses.sum(), gradient


class Table:
    """A vocabulary table that is simply there."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.num_embeddings = weight.shape[0]

    def rows(self, start: int, stop: int) -> Tensor:
        return self.weight[start:stop]

    def rows_of(self, ids: Tensor) -> Tensor:
        return self.weight[ids]


def make(spread: float = 1.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, DIM, generator=generator) * spread
    weight = torch.randn(VOCABULARY, DIM, generator=generator)
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    targets[:2] = torch.tensor([0, VOCABULARY - 1])
    return hidden.to(dtype), weight.to(dtype), targets


def reference(hidden: Tensor, weight: Tensor, targets: Tensor, logit_map: LogitMap) -> tuple[Tensor, Tensor]:
    """Loss and gradient from full logits in float64, by autograd."""
    hidden = hidden.double().requires_grad_()
    logits = hidden @ weight.double().T * logit_map.scale
    if logit_map.cap is not None:
        logits = torch.tanh(logits / logit_map.cap) * logit_map.cap
    loss = F.cross_entropy(logits, targets, reduction="sum")
    return loss.detach(), torch.autograd.grad(loss, hidden)[0]


@each_map
@pytest.mark.parametrize("slice_size", [1, 7, 64, 101, 1000])
def test_value_and_gradient_for_any_slice(logit_map, slice_size):
    hidden, weight, targets = make()
    loss, gradient = summed_cross_entropy(
        hidden, targets, Table(weight), logit_map=logit_map, slice_size=slice_size, with_gradient=True
    )
    expected_loss, expected_gradient = reference(hidden, weight, targets, logit_map)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=2e-6)


@each_map
@pytest.mark.parametrize("spread", [1e-6, 30.0, 300.0])
def test_extreme_logits(logit_map, spread):
    """Up to thousands: exp of them overflows, and most softmax weights underflow."""
    hidden, weight, targets = make(spread)
    loss, gradient = summed_cross_entropy(
        hidden, targets, Table(weight), logit_map=logit_map, slice_size=16, with_gradient=True
    )
    expected_loss, expected_gradient = reference(hidden, weight, targets, logit_map)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-3, atol=2e-4)


@each_map
def test_bfloat16(logit_map):
    hidden, weight, targets = make(dtype=torch.bfloat16)
    loss, gradient = summed_cross_entropy(
        hidden, targets, Table(weight), logit_map=logit_map, slice_size=16, with_gradient=True
    )
    assert (loss.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)
    expected_loss, expected_gradient = reference(hidden, weight, targets, logit_map)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-2, atol=0)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=5e-2, atol=3e-2)


@pytest.fixture(params=[False, True], ids=["float32 factors", "factors as they are"])
def factors(request, monkeypatch):
    """Products as a CPU has them, and with factors in the compute dtype, as a GPU has them.

    PyTorch has no CPU kernel of the latter. The one here is exact in its products and sums in float32, like a GPU's.
    """
    if not request.param:
        yield
        return
    monkeypatch.setattr(loss_module, "SUMMED_IN_FLOAT32", ("cuda", "cpu"))
    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype", lambda left, right, out_dtype: left.to(out_dtype) @ right.to(out_dtype), "CPU")
    yield
    library._destroy()


CONFIDENT_MAPS = {
    "plain": LogitMap(),
    "capped": LogitMap(cap=60.0),
    "gemma2": LogitMap(cap=30.0),
    "a sixth": LogitMap(scale=1 / 6),
    "a tenth": LogitMap(scale=0.1),
    "a tenth with a cap": LogitMap(scale=0.1, cap=30.0),
}


@pytest.mark.parametrize("probability", [0.5, 0.73, 0.9, 0.97, 0.99, 0.993, 0.999, 0.9999])
@pytest.mark.parametrize("logit_map", CONFIDENT_MAPS.values(), ids=CONFIDENT_MAPS.keys())
@pytest.mark.usefixtures("factors")
def test_the_gradient_of_tokens_that_fit_well_in_bfloat16(probability, logit_map):
    """Each token's gradient within 1 % of float64, also where its two terms cancel; the slice of the target varies."""
    generator = torch.Generator().manual_seed(1)
    tokens, dim, vocabulary = 48, 256, 2000
    weight = (torch.randn(vocabulary, dim, generator=generator) * 0.05).bfloat16()
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    rival = (targets + 531) % vocabulary
    gap = math.log(probability / (1 - probability))
    wanted = torch.tensor([22.0, 22.0 - gap]) / logit_map.scale
    # The smallest state that gives target and rival these logits, and small ones to all others.
    pairs = torch.stack([weight[targets], weight[rival]], dim=1).double()
    hidden = (torch.linalg.pinv(pairs) @ wanted.double()).bfloat16()
    hidden += (torch.randn(tokens, dim, generator=generator) * 0.01).bfloat16()
    loss, gradient = summed_cross_entropy(
        hidden, targets, Table(weight), logit_map=logit_map, slice_size=300, with_gradient=True
    )
    expected_loss, expected = reference(hidden, weight, targets, logit_map)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-4, atol=1e-4)
    error = (gradient.double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < 0.01, f"{error.max():.4f}"


def test_evaluation_gives_the_same_value_and_no_gradient():
    hidden, weight, targets = make()
    settings = {"logit_map": LogitMap(), "slice_size": 16}
    loss, gradient = summed_cross_entropy(hidden, targets, Table(weight), with_gradient=False, **settings)
    assert gradient is None
    assert loss == summed_cross_entropy(hidden, targets, Table(weight), with_gradient=True, **settings)[0]


def test_a_single_overflowing_state_is_not_hidden():
    hidden, weight, targets = make()
    hidden[4, 0] = math.inf
    loss, _ = summed_cross_entropy(
        hidden, targets, Table(weight), logit_map=LogitMap(), slice_size=16, with_gradient=True
    )
    assert not torch.isfinite(loss)


def head_loss_on(weight: Tensor, calls: list[int]):
    def head_loss(states: Tensor, targets: Tensor, with_gradient: bool):
        calls.append(states.shape[0])
        return summed_cross_entropy(
            states, targets, Table(weight), logit_map=LogitMap(), slice_size=16, with_gradient=with_gradient
        )

    return head_loss


def test_masked_tokens_have_neither_loss_nor_gradient():
    hidden, weight, targets = make()
    batch = torch.zeros(3, 8, DIM)
    batch_targets = torch.full((3, 8), IGNORED)
    places = [(0, 0), (0, 7), (1, 3), (2, 5), (2, 6)]
    for place, state, target in zip(places, hidden, targets, strict=False):
        batch[place], batch_targets[place] = state, target
    batch.requires_grad_()
    calls = []
    loss = token_loss(batch * 1.0, batch_targets, head_loss_on(weight, calls))
    (loss * 3.0).backward()
    expected_loss, expected_gradient = reference(hidden[:5], weight, targets[:5], LogitMap())
    assert calls == [5]
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-6, atol=0)
    gradient = batch.grad.clone()
    for place, row in zip(places, expected_gradient, strict=True):
        torch.testing.assert_close(gradient[place].double(), 3.0 * row, rtol=1e-4, atol=1e-5)
        gradient[place] = 0.0
    assert not gradient.any()


def test_no_token_has_a_target():
    """The head is read all the same, since on a sharded base the other ranks wait for this one's part."""
    _, weight, _ = make()
    batch = torch.randn(2, 4, DIM, requires_grad=True)
    calls = []
    loss = token_loss(batch, torch.full((2, 4), IGNORED), head_loss_on(weight, calls))
    loss.backward()
    assert (loss.item(), calls) == (0.0, [0])
    assert torch.equal(batch.grad, torch.zeros_like(batch))


@pytest.mark.parametrize("grad", [True, False])
def test_no_graph_where_nobody_needs_one(grad):
    hidden, weight, targets = make()
    with torch.set_grad_enabled(grad):
        loss = token_loss(hidden[None], targets[None], head_loss_on(weight, []))
    assert loss.grad_fn is None


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize(("tokens", "dim"), [(600, 8), (4, 700)])
def test_neither_full_logits_nor_the_full_table_ever_exist(tokens, dim):
    vocabulary, megabytes = 5000, 0.75
    size = slice_rows(tokens, dim, megabytes)
    table, targets = Table(torch.randn(vocabulary, dim)), torch.randint(0, vocabulary, (tokens,))
    with LargestTensor() as largest:
        summed_cross_entropy(
            torch.randn(tokens, dim), targets, table, logit_map=LogitMap(cap=5.0), slice_size=size, with_gradient=True
        )
    assert 0 < largest.elements * 4 <= megabytes * 2**20
    assert max(tokens, dim) * vocabulary * 4 > 10 * megabytes * 2**20


def test_slices_never_get_absurdly_narrow():
    assert slice_rows(2048, 4096, 64.0) == 4096
    assert slice_rows(10**6, 4096, 1.0) == 256
