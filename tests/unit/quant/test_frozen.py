"""Frozen modules: products and gradients against float64, and what autograd keeps between the two passes."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch.utils.checkpoint import checkpoint

from dist_qft.base_model.head import OutputHead
from dist_qft.base_model.loss import LogitMap
from dist_qft.errors import UserError
from dist_qft.quant.codebook4 import _e4m3, _e8m0, _pairs
from dist_qft.quant.formats import NF4, Q8_0, Affine4, Dense, Format
from dist_qft.quant.frozen import FrozenEmbedding, FrozenLinear, FrozenWeight
from dist_qft.quant.nf4 import codebook
from dist_qft.quant.nf4_codes import _tables

FORMATS = [NF4(), NF4(64, True), Affine4(), Affine4((8, 4)), Q8_0(), Dense()]
OUT, IN = 48, 128

each_format = pytest.mark.parametrize("format", FORMATS, ids=str)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fill(module: FrozenWeight, weight: torch.Tensor) -> None:
    for name, tensor in module.format.quantize(weight).items():
        setattr(module, name, nn.Parameter(tensor.to(module.packed()[name].dtype), requires_grad=False))


def linear_of(format: Format, dtype: torch.dtype = torch.float32, bias: bool = True, seed: int = 0) -> FrozenLinear:
    linear = FrozenLinear(IN, OUT, format, bias, dtype)
    fill(linear, random(OUT, IN, seed=seed))
    if bias:
        linear.bias = nn.Parameter(random(OUT, seed=seed + 1, dtype=dtype), requires_grad=False)
    return linear


def exact_weight(linear: FrozenLinear) -> torch.Tensor:
    return linear.format.dequantize(linear.packed(), linear.weight_shape, torch.float64)


@each_format
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_product_and_gradient_against_float64(format, leading, bias):
    linear = linear_of(format, bias=bias)
    x = random(*leading, IN, seed=2).requires_grad_()
    upstream = random(*leading, OUT, seed=3)
    y = linear(x)
    y.backward(upstream)
    weight = exact_weight(linear)
    expected = x.detach().double() @ weight.T + (linear.bias.double() if bias else 0.0)
    torch.testing.assert_close(y.detach().double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(x.grad.double(), upstream.double() @ weight, rtol=1e-5, atol=1e-4)
    assert all(parameter.grad is None for parameter in linear.parameters())


@each_format
def test_gradcheck_in_float64(format):
    linear = linear_of(format, torch.float64)
    assert torch.autograd.gradcheck(linear, random(2, IN, dtype=torch.float64).requires_grad_())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_compute(dtype):
    linear = linear_of(Affine4(), dtype)
    x = random(4, IN, seed=2, dtype=dtype).requires_grad_()
    y = linear(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    expected = x.detach().double() @ exact_weight(linear).T + linear.bias.double()
    torch.testing.assert_close(y.detach().double(), expected, rtol=2e-2, atol=0.2)
    with pytest.raises(RuntimeError):
        linear(x.detach().float())


@each_format
def test_autograd_saves_no_tensor(format):
    linear, saved = linear_of(format), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()), lambda _: None):
        y = linear(random(4, IN).requires_grad_())
        assert saved == []
        assert vars(y.grad_fn) == {"module": linear}
        # The same hooks do see what a plain linear layer keeps.
        nn.functional.linear(random(4, IN).requires_grad_(), linear.dequantize())
        assert saved == [OUT * IN]


def test_no_graph_without_a_gradient_to_return():
    linear = linear_of(NF4())
    with torch.no_grad():
        assert linear(random(4, IN).requires_grad_()).grad_fn is None
    assert linear(random(4, IN)).grad_fn is None


@each_format
def test_backward_reads_the_tensors_of_its_own_time(format):
    """An engine frees the gathered tensors after the forward pass and gathers others for the backward pass."""
    linear, other = linear_of(format), linear_of(format, seed=7)
    x = random(4, IN).requires_grad_()
    y = linear(x)
    for name, tensor in linear.packed().items():
        tensor.untyped_storage().resize_(0)
        setattr(linear, name, getattr(other, name))
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(x.grad, (torch.ones(4, OUT).double() @ exact_weight(other)).float())


def of_this_thread(format: Format) -> torch.Tensor:
    """A product without gradient in inference mode, then one with a gradient, all in a thread that has made none."""
    linear = linear_of(format)
    with torch.inference_mode():
        linear(random(4, IN))
    x = random(4, IN).requires_grad_()
    linear(x).sum().backward()
    return x.grad


@each_format
def test_training_after_inference_mode(format):
    with ThreadPoolExecutor(1) as thread:
        gradient = thread.submit(of_this_thread, format).result()
    expected = torch.ones(4, OUT).double() @ exact_weight(linear_of(format))
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("constant", [codebook, _tables, _pairs, _e8m0, _e4m3], ids=lambda made: made.__name__)
def test_a_kept_constant_is_no_tensor_of_inference_mode(constant):
    arguments = [codebook] if constant is _tables else []
    with torch.inference_mode():
        made = constant.__wrapped__(*arguments)  # the cache has one of another test
    assert not any(tensor.is_inference() for tensor in (made if isinstance(made, tuple) else [made]))


def test_under_activation_checkpointing():
    linear = linear_of(Affine4())
    gradients = []
    for run in (linear, lambda x: checkpoint(linear, x, use_reentrant=False)):
        x = random(4, IN).requires_grad_()
        run(x).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@each_format
@pytest.mark.parametrize(("start", "stop"), [(0, OUT), (3, 21), (8, 16), (5, 6), (4, 4)])
def test_rows_are_rows_of_the_weight(format, start, stop):
    linear = linear_of(format)
    assert torch.equal(linear.rows(start, stop), linear.dequantize()[start:stop])


@each_format
def test_parameters_are_the_announced_ones_on_meta(format):
    linear = FrozenLinear(IN, OUT, format, bias=True, dtype=torch.bfloat16)
    packed_shapes = format.packed_shapes((OUT, IN))
    announced = {name: (shape, dtype or torch.bfloat16) for name, (shape, dtype) in packed_shapes.items()}
    announced["bias"] = ((OUT,), torch.bfloat16)
    parameters = dict(linear.named_parameters())
    assert {name: (tuple(p.shape), p.dtype) for name, p in parameters.items()} == announced
    assert all(p.is_meta and not p.requires_grad for p in parameters.values())
    assert list(linear.buffers()) == []
    assert FrozenLinear(IN, OUT, format, bias=False, dtype=torch.float32).bias is None


def test_any_bytes_survive_copies_and_files():
    """Bytes that would be NaN as floats, which storage as floats is known to lose."""
    linear = FrozenLinear(IN, OUT, Affine4(), bias=False, dtype=torch.bfloat16, device="cpu")
    linear.codes.copy_(torch.arange(linear.codes.numel()).remainder(256).view_as(linear.codes))
    linear.codes[0] = 0xFF
    linear.scale.view(torch.int16).fill_(0x7E01)
    linear.zero.view(torch.int16).fill_(-1)
    restored = FrozenLinear(IN, OUT, Affine4(), bias=False, dtype=torch.bfloat16)
    restored.load_state_dict(load(save(copy.deepcopy(linear).state_dict())), assign=True)
    for name, tensor in linear.packed().items():
        assert torch.equal(tensor.view(torch.uint8), restored.packed()[name].view(torch.uint8))


@pytest.mark.parametrize("cast", [torch.float32, torch.bfloat16])
def test_a_cast_of_the_constants_is_an_error(cast):
    linear = linear_of(Affine4())
    linear.to(cast)
    with pytest.raises(TypeError, match=rf"packed tensor 'scale' \(affine4\) was cast from torch.float16 to {cast}"):
        linear(random(4, IN, dtype=cast))


def test_a_shape_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="FrozenLinear: nf4 block 64 does not divide in_features 100"):
        FrozenLinear(100, 8, NF4(), bias=False, dtype=torch.float32)


def embedding_of(format: Format, dtype: torch.dtype = torch.float32, scale: float | None = None) -> FrozenEmbedding:
    embedding = FrozenEmbedding(50, 96, format, dtype, padding_idx=0, scale=scale)
    fill(embedding, random(50, 96))
    return embedding


@pytest.mark.parametrize("format", [Q8_0(), Dense(), Affine4()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (7,), (2, 5), (0,)], ids=str)
def test_embedding_looks_up_rows(format, dtype, shape):
    embedding = embedding_of(format, dtype)
    ids = torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(1))
    table = embedding.dequantize()
    assert torch.equal(embedding(ids), table[ids])
    assert embedding(ids).shape == (*shape, 96) and embedding(ids).dtype == dtype
    assert not embedding(ids).requires_grad
    assert torch.equal(embedding.rows(7, 19), table[7:19])


def test_embedding_converts_only_the_rows_it_looks_up(monkeypatch):
    embedding, shapes = embedding_of(Q8_0()), []
    dequantize = Q8_0.dequantize
    monkeypatch.setattr(Q8_0, "dequantize", lambda *args: shapes.append(args[2]) or dequantize(*args))
    embedding(torch.tensor([[4, 4, 9]]))
    embedding.rows(10, 14)
    assert shapes == [(3, 96), (4, 96)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding_scale_is_that_of_gemma(dtype):
    embedding, ids = embedding_of(Dense(), dtype, scale=96**0.5), torch.tensor([1, 2, 3])
    gemma = nn.functional.embedding(ids, embedding.weight) * torch.tensor(96**0.5).to(dtype)
    assert torch.equal(embedding(ids), gemma)
    assert torch.equal(embedding.rows(1, 4), embedding.weight[1:4])


def test_embedding_lends_its_table_within_a_call():
    embedding, hidden = embedding_of(Q8_0()), random(3, 96, seed=4)
    logits = embedding(hidden, use=lambda table, states: states @ table.rows(0, 50).T)
    assert torch.equal(logits, hidden @ embedding.dequantize().T)


def test_hooks_of_other_libraries_meet_a_tensor():
    """transformers asks the output of every call for a gradient; a tied head's call must survive that."""
    embedding, hidden = embedding_of(Q8_0()), random(3, 96, seed=4)
    head = OutputHead(embedding, None, loss_map=LogitMap())
    targets = torch.tensor([1, 2, 3])
    expected = head.loss(hidden, targets, with_gradient=True)
    embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    loss, gradient, _ = head.loss(hidden, targets, with_gradient=True)
    assert not loss.requires_grad
    assert torch.equal(loss, expected[0]) and torch.equal(gradient, expected[1])
    assert head.loss(hidden, targets, with_gradient=False)[1] is None


@pytest.mark.parametrize("tokens", [0, 3, 256, 600])
def test_likelihoods_are_those_of_all_logits_at_once(tokens):
    head = OutputHead(embedding_of(Q8_0()), None, loss_map=LogitMap(scale=0.5, cap=3.0))
    hidden, targets = random(tokens, 96, seed=4), torch.arange(tokens) % 50
    logits = head.loss_map(head(hidden))
    targets[::2] = logits.argmax(-1)[::2]
    values, greedy = head.likelihoods(hidden, targets)
    expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(greedy, logits.argmax(-1) == targets) and greedy.dtype == torch.bool


def test_embedding_refuses_ids_and_formats_it_cannot_serve():
    with pytest.raises(IndexError):
        embedding_of(Q8_0())(torch.tensor([50]))
    with pytest.raises(ValueError, match="needs a format that stores each row by itself"):
        FrozenEmbedding(48, 96, Affine4((8, 4)), torch.float32)
