"""Merge-aware training: the live model computes with the very zeros that the merge writes."""

import json

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dist_qft.config.load import load_config
from dist_qft.errors import UserError
from dist_qft.methods.adapters.attach import AdapterSet
from dist_qft.methods.adapters.exact_fold import folded, zeros_of
from dist_qft.methods.adapters.schedule import TileSettings
from dist_qft.methods.adapters.tile_adapter import TileAdapter, tile_values
from dist_qft.quant.affine4 import Affine4
from dist_qft.quant.frozen import FrozenLinear
from dist_qft.sharding.replicated import ReplicatedEngine
from dist_qft.tuned_model.checkpointed import config_of, find_checkpoint, open_checkpointed
from dist_qft.tuned_model.written_zeros import fixed_values
from tests.support.tiny_model import tiny_config
from tests.support.whole_runs import train

OUT, IN = 48, 128


def adapted(block: tuple[int, int], pool: int, repeat: int, inner: int | None, *, merge_aware: bool):
    """A frozen layer and an adapter with values of about a float16 step of the zeros, hooked onto it."""
    generator = torch.Generator().manual_seed(5)
    linear = FrozenLinear(IN, OUT, Affine4(block), bias=True, dtype=torch.float32, device="cpu")
    packed = linear.format.quantize(torch.randn(OUT, IN, generator=generator) * 0.1)
    tensors = {**packed, "bias": torch.randn(OUT, generator=generator)}
    linear.load_state_dict(tensors)
    sizes = {"in_features": IN, "out_features": OUT, "pool": pool, "repeat": repeat, "inner": inner}
    adapter = TileAdapter(TileSettings(**sizes, rank=4, alpha=8.0, merge_aware=merge_aware))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    adapters = AdapterSet({"linear": adapter})
    adapters.attach(torch.nn.ModuleDict({"linear": linear}))
    return linear, adapter, adapters


CASES = [((1, 32), 32, 1, 4), ((1, 32), 64, 2, None), ((8, 4), 4, 8, None), ((8, 4), 8, 16, 4)]


@pytest.mark.parametrize(("block", "pool", "repeat", "inner"), CASES)
def test_the_output_is_that_of_the_merged_layer_bit_for_bit(block, pool, repeat, inner):
    linear, adapter, adapters = adapted(block, pool, repeat, inner, merge_aware=True)
    x = torch.randn(3, 5, IN)
    with_gradient = linear(x)
    with torch.no_grad():
        live = linear(x)
    with adapters.disabled():
        before = linear(x)
        zero, _ = folded(linear.zero.view(-1), 0, linear.zero.shape[1], block, adapter)
        assert not torch.equal(zero.view_as(linear.zero), linear.zero)
        linear.zero.copy_(zero.view_as(linear.zero))
        merged = linear(x)
    assert torch.equal(live, merged) and torch.equal(with_gradient, merged)
    assert not torch.equal(before, merged)


@pytest.mark.parametrize(("block", "pool", "repeat", "inner"), CASES)
def test_zeros_written_once_give_the_bits_of_zeros_folded_at_each_use(block, pool, repeat, inner, monkeypatch):
    """With checkpointing's second forward pass, over two steps; afterwards, and after an error, the base is itself."""
    linear, adapter, adapters = adapted(block, pool, repeat, inner, merge_aware=True)
    engine, x = ReplicatedEngine(), torch.randn(3, IN, requires_grad=True)
    original, counted = linear.zero.clone(), []
    for module in ("tuned_model.written_zeros", "methods.adapters.exact_fold"):
        counting = lambda *args: counted.append(1) or folded(*args)  # noqa: E731
        monkeypatch.setattr(f"dist_qft.{module}.folded", counting)

    def pass_through() -> list[torch.Tensor]:
        for tensor in (x, *adapter.parameters()):
            tensor.grad = None
        output = checkpoint(linear, x, use_reentrant=False)
        output.square().sum().backward()
        return [output.detach(), x.grad, *(parameter.grad for parameter in adapter.parameters())]

    for _ in range(2):
        each = pass_through()
        assert len(counted) == 3, "forward pass, its recomputation, backward pass"
        with fixed_values(engine, adapters):
            once = [pass_through() for _ in range(2)][-1]
        assert len(counted) == 4
        assert all(torch.equal(a, b) for a, b in zip(each, once, strict=True))
        counted.clear()
        with torch.no_grad():
            adapter.A += 0.01
    with pytest.raises(KeyError), fixed_values(engine, adapters):
        raise KeyError
    with adapters.disabled(), fixed_values(engine, adapters):
        assert torch.equal(linear.zero, original)
    assert torch.equal(linear.zero, original)


@pytest.mark.parametrize(("block", "pool", "repeat", "inner"), CASES)
def test_gradients_are_those_of_the_exact_adapter(block, pool, repeat, inner):
    """Of the adapter the very same; of the input those of the rounded weight."""
    gradients = {}
    for merge_aware in (False, True):
        linear, adapter, _ = adapted(block, pool, repeat, inner, merge_aware=merge_aware)
        x = torch.randn(7, IN, generator=torch.Generator().manual_seed(6)).requires_grad_()
        grad = torch.randn(7, OUT, generator=torch.Generator().manual_seed(7))
        linear(x).backward(grad)
        gradients[merge_aware] = [parameter.grad for parameter in adapter.parameters()]
        if merge_aware:
            torch.testing.assert_close(x.grad, grad @ linear.dequantize(), rtol=0, atol=0)
            dense = torch.kron(tile_values(adapter), torch.ones(repeat, pool, dtype=torch.float64))
            exact = grad.double() @ (linear.format.dequantize(linear.packed(), (OUT, IN), torch.float32) + dense)
            torch.testing.assert_close(x.grad.double(), exact, rtol=1e-2, atol=1e-2)
    assert all(torch.equal(a, b) for a, b in zip(gradients[False], gradients[True], strict=True))


def test_rounding_to_float16_is_numpys():
    """Ties, values next to them by one float64 step, subnormals, both ends of the range, and many others."""
    generator = torch.Generator().manual_seed(8)
    halves = torch.arange(0x7BFF, dtype=torch.int16).view(torch.float16).double()
    ties = (halves[1:] + halves[:-1]) / 2
    near = [torch.nextafter(ties, torch.full_like(ties, end)) for end in (0.0, torch.inf)]
    odd = torch.randn(200_000, generator=generator, dtype=torch.float64) * torch.logspace(-9, 5, 200_000).double()
    values = torch.cat([halves, ties, *near, odd, torch.tensor([0.0, 65519.99, 65520.0, 1e300, 1e-300])])
    values = torch.cat([values, -values])
    settings = TileSettings(in_features=1, out_features=1, pool=1, repeat=1, rank=1, alpha=1.0, inner=None)
    zero = torch.zeros(len(values), dtype=torch.float16)
    adapter = TileAdapter(settings.model_copy(update={"out_features": len(values)}))
    adapter.A = torch.nn.Parameter(values[:, None], requires_grad=False)
    written, _ = folded(zero, 0, 1, (1, 1), adapter)
    with np.errstate(over="ignore"):
        expected = values.numpy().astype(np.float16)
    assert np.array_equal(written.numpy(), expected)


def train_and_merge(config) -> float:
    run = train(config)
    return run.evaluations.tuned.loss if run.evaluations.tuned else 0.0


@pytest.mark.parametrize("engine", ["fsdp", "zero"])
def test_a_merge_of_what_was_trained_so_changes_no_logit(pools, tiny_gguf, tmp_path, engine):
    sections = {
        "quantization": {"linear": "affine4", "block": [1, 32]},
        "method": {"name": "qahira", "pool": 32, "repeat": 1, "rank": 4, "merge_aware": True},
        "sharding": {"engine": engine, "device": "cpu"},
        "merge": {"at_end": "gguf"},
    }
    pools[2].run(train_and_merge, config=tiny_config(tiny_gguf, tmp_path / "run", **sections))
    certificate = json.loads((tmp_path / "run" / "merged.gguf.certificate.json").read_text())
    assert certificate["logits"]["maximum"] == 0.0
    assert certificate["logits"]["perplexity"] == certificate["logits"]["live_perplexity"]
    assert certificate["lossless"] and certificate["weights"]["max_float16_steps"] > 0.3
    assert certificate["summary"].endswith("logits equal the live model's bit for bit")


def zeros_around_a_first_pass(path) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """This rank's zeros before and after the first forward pass of the base, which has dW in them."""
    checkpoint = find_checkpoint(path)
    parts, _ = open_checkpointed(checkpoint, config_of(checkpoint), torch.device("cpu"))
    layers = parts.trainables.folded_at_use
    zeros = [getattr(layer, zeros_of(layer.format).tensor) for layer, _ in layers]

    def own() -> list[torch.Tensor]:
        return [parts.engine.local(zero).clone() for zero in zeros]

    before, ids = own(), torch.tensor([[1, 2, 3]])
    with parts.fixed(), torch.no_grad():
        inside = own()
        parts.base.hidden_states(ids, torch.arange(3)[None], None)
    assert not all(map(torch.equal, before, inside)), "nothing was written"
    return before, own()


@pytest.mark.parametrize("engine", ["fsdp", "zero"])
def test_zeros_of_short_parts_are_put_back_behind_the_first_pass(pools, make_run, tiny_llama, engine):
    """FSDP2 moves a part that is shorter than others to larger storage: 32 and 64 rows over three ranks."""
    run = make_run(
        tiny_llama,
        quantization={"linear": "affine4", "block": [1, 32]},
        method={"name": "qahira", "pool": 32, "repeat": 1, "rank": 4, "merge_aware": True},
        sharding={"engine": engine, "device": "cpu"},
    )
    for before, after in pools[3].run(zeros_around_a_first_pass, path=run):
        assert all(map(torch.equal, before, after))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"method": {"name": "qlora"}}, "method.merge_aware: qlora does not use it; qlora has "),
        (
            {"method": {"name": "qahira"}, "quantization": {"linear": "nf4"}},
            "method.merge_aware: nf4 has no zeros to take dW; choose quantization.linear: affine4",
        ),
        (
            {"method": {"name": "qahira", "dropout": 0.1}, "quantization": {"linear": "affine4"}},
            "method.dropout: got 0.1, must be 0 with merge_aware",
        ),
        ({"method": {"name": "qst"}}, "method.merge_aware: qst does not use it; qst has "),
    ],
)
def test_what_cannot_merge_exactly_is_refused(tmp_path, sections, message):
    sections["method"]["merge_aware"] = True
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({"output_dir": "o", "model": {"path": "m"}, **sections}))
    with pytest.raises(UserError) as refused:
        load_config(path)
    assert message in str(refused.value)


def test_tiles_that_cut_blocks_are_refused_before_loading(pools, tiny_llama, tmp_path):
    method = {"name": "qahira", "pool": 4, "repeat": 4, "merge_aware": True}
    with pytest.raises(AssertionError) as refused:
        pools[1].run(train_and_merge, config=tiny_config(tiny_llama, tmp_path / "run", method=method))
    assert "UserError: method.merge_aware: no exact merge: blocks of [8, 4] cross the tiles of" in str(refused.value)
    assert "repeat 4 is not a multiple of 8 (nearest: 8 or 16) (and 20 more layers)" in str(refused.value)
