"""Trained tokens: rows of embedding and LM head against whole models in float64, and lists that are refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from dist_qft.base_model.loss import token_loss, token_losses_at
from dist_qft.base_model.skeleton import BaseModel
from dist_qft.config.load import change_config
from dist_qft.errors import UserError
from dist_qft.methods.adapters.adapter_spec import AdapterSpec, adapter_spec, stored_adapters
from dist_qft.methods.adapters.attach import AdapterSet
from dist_qft.methods.adapters.token_rows import TrainedTokens
from dist_qft.methods.reference import SecondStream
from dist_qft.methods.specs import make_spec
from dist_qft.plan import make_plan, planned_base
from tests.support.families import FAMILIES, QUANTIZED, open_base, reference_model, save_random, tokens_of
from tests.support.tiny_model import tiny_config

IDS = (0, 17, 50, 130)
# Tied and not, with a bias of the head, a cap, scales of logits and of what is looked up.
CASES = ["llama", "llama-tied", "opt", "gemma2", "cohere", "granite", "gemma4_text", "phi", "gpt2"]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    folders = {}

    def get(family: str):
        if family not in folders:
            folders[family] = save_random(FAMILIES[family], tmp_path_factory.mktemp(family))
        return folders[family]

    return get


def tokens_in(base: BaseModel) -> TrainedTokens:
    tables = {path: table.embedding_dim for path, table in base.tables().items()}
    return TrainedTokens(IDS, (None,) * len(IDS), tables, base.tied)


def with_rows(base: BaseModel, size: float = 0.3) -> AdapterSet:
    """Adapters that change nothing on one layer, and rows with random differences, hooked on."""
    from dist_qft.config.methods.door import make_method

    target = next(iter(base.linears)).rpartition(".")[2]
    tiles = adapter_spec(make_method(name="qlora", rank=2, targets=[target]), base).tiles
    adapters = AdapterSpec(tiles, tokens=tokens_in(base)).build(0)
    generator = torch.Generator().manual_seed(5)
    for delta in adapters.token_rows.deltas.values():
        delta.data = torch.randn(delta.shape, generator=generator) * size
    adapters.attach(base.model)
    return adapters


def some_tokens() -> tuple[Tensor, Tensor, Tensor]:
    """Ids with trained ones among them, some twice, positions, and targets likewise."""
    ids, positions = tokens_of(2, 12)
    ids[0, 3], ids[0, 7], ids[1, 2], ids[1, 4] = 17, 17, 50, 130
    targets = ids.roll(-1, 1)
    targets[:, -1] = -100
    return ids, positions, targets


@pytest.mark.parametrize("family", CASES)
def test_loss_and_gradients_are_those_of_a_whole_model_in_float64(folder_of, family):
    base = open_base(folder_of(family), QUANTIZED["affine4"])
    whole = reference_model(base, folder_of(family)).double()
    adapters = with_rows(base)
    ids, positions, targets = some_tokens()
    loss = token_loss(base.hidden_states(ids, positions), targets, base.head.loss)
    (2.5 * loss).backward()

    weights = {name: tensor.detach() for name, tensor in whole.named_parameters()}
    leaves = {p: delta.detach().double().requires_grad_() for p, delta in adapters.token_rows.deltas.items()}
    for path, leaf in leaves.items():
        weights[f"{path}.weight"] = weights[f"{path}.weight"].index_add(0, torch.tensor(IDS), leaf)
    arguments = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    logits = torch.func.functional_call(whole, weights, (), arguments, tie_weights=True).logits.flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), reduction="sum")
    (2.5 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert len(leaves) == (1 if base.tied else 2)
    for path, leaf in leaves.items():
        found = adapters.token_rows.deltas[path].grad.double()
        assert (found - leaf.grad).abs().max() <= 2e-5 * leaf.grad.abs().max(), path
    assert all(parameter.grad is None for parameter in base.model.parameters())


@pytest.mark.parametrize("family", ["llama", "gemma4_text"])
@torch.no_grad()
def test_generation_reads_the_rows_and_without_adapters_the_base(folder_of, family):
    """Of zero differences, too: the base bit for bit."""
    base = open_base(folder_of(family), QUANTIZED["affine4"])
    ids, positions, _ = some_tokens()

    def logits() -> Tensor:
        return base.model(input_ids=ids, position_ids=positions).logits

    before = logits()
    adapters = with_rows(base)
    assert (logits() - before).abs().max() > 0.1
    with adapters.disabled():
        assert torch.equal(logits(), before)
    for delta in adapters.token_rows.deltas.values():
        delta.zero_()
    assert torch.equal(logits(), before)
    adapters.detach()
    assert torch.equal(logits(), before) and base.embedding.changed is base.units.tables[-1].changed is None


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
@pytest.mark.parametrize("training", [True, False])
def test_a_reference_beside_has_the_rows_of_the_base(folder_of, family, training):
    """States and losses of the second stream are those of the base alone; gradients by weights of each token."""
    base = open_base(folder_of(family), QUANTIZED["affine4"])
    ids, positions, targets = some_tokens()
    places = (targets.flatten() >= 0).nonzero()[:, 0]
    labels = targets.flatten()[places]
    with torch.no_grad():
        states = base.hidden_states(ids, positions)
        expected, _ = token_losses_at(states, None, places, labels, base.head)
    adapters = with_rows(base)
    stream = SecondStream(base.decoder, base.layers, adapters, family, base.embedding)
    with torch.set_grad_enabled(training):
        hidden = base.hidden_states(ids, positions)
        reference = stream.take()
        own, beside = token_losses_at(hidden, reference, places, labels, base.head)
    assert torch.equal(reference, states) and not torch.equal(hidden, states)
    torch.testing.assert_close(beside, expected, rtol=1e-6, atol=1e-6)
    assert (own - beside).abs().max() > 1e-2
    if training:
        weights = torch.linspace(-1, 1, len(labels))
        deltas = list(adapters.token_rows.deltas.values())
        grads = torch.autograd.grad((weights * own).sum(), deltas, retain_graph=True)
        first, second = (torch.autograd.grad(part.sum(), deltas, retain_graph=True) for part in own.split([9, 13]))
        assert len(own) == 22 and all(grad.abs().max() > 0 for grad in grads)
        whole = torch.autograd.grad(own.sum(), deltas)
        for found, one, two in zip(whole, first, second, strict=True):
            torch.testing.assert_close(found, one + two, rtol=1e-4, atol=1e-5)
    stream.detach()


@pytest.mark.parametrize("first", [1, 9])
@pytest.mark.parametrize("reference", [False, True])
def test_losses_of_which_the_first_alone_are_differentiable(folder_of, first, reference):
    """The same losses, and of the first the same gradients, by states and by rows; the others are constants."""
    base = open_base(folder_of("llama"), QUANTIZED["affine4"])
    adapters = with_rows(base)
    ids, positions, targets = some_tokens()
    places = (targets.flatten() >= 0).nonzero()[:, 0]
    labels = targets.flatten()[places]
    with torch.no_grad():
        states = base.hidden_states(ids, positions)
    leaves = [states.clone().requires_grad_(), adapters.token_rows.deltas["lm_head"]]
    beside = states if reference else None
    every, _ = token_losses_at(leaves[0], beside, places, labels, base.head)
    some, _ = token_losses_at(leaves[0], beside, places, labels, base.head, first)
    torch.testing.assert_close(some, every, rtol=1e-5, atol=1e-6)
    weights = torch.linspace(-1, 1, len(labels))
    found = torch.autograd.grad((weights * some).sum(), leaves)
    expected = torch.autograd.grad((weights * every)[:first].sum(), leaves)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        assert one.abs().max() > 0


def test_rows_in_16_bits_are_rounded_once(folder_of):
    base = open_base(folder_of("llama"), QUANTIZED["nf4 twice"], torch.bfloat16)
    table = base.embedding
    before = table.rows_of(torch.tensor(IDS))
    adapters = with_rows(base, 0.01)
    delta = adapters.token_rows.deltas["model.embed_tokens"].detach()
    wanted = (before.float() + delta).bfloat16()
    assert torch.equal(table.rows_of(torch.tensor([50, 17, 3]))[:2], wanted[[2, 1]])
    assert torch.equal(table.rows(0, 131)[list(IDS)], wanted)
    assert torch.equal(table.rows(40, 60)[10], wanted[2])


def tuned(model, tmp_path, tokens):
    config = tiny_config(model, tmp_path / "run")
    return change_config(config, {"method.train_tokens": tokens})


def test_tokens_and_ids_are_found_counted_and_stored(tiny_llama, tmp_path):
    config = tuned(tiny_llama, tmp_path, ["<|im_end|>", 319, "<|im_start|>"])
    base = planned_base(config)
    spec, plain = make_spec(config, base), make_spec(tiny_config(tiny_llama, tmp_path / "run"), base)
    assert spec.tokens.ids == (1, 2, 319) and spec.tokens.tokens[:2] == ("<|im_start|>", "<|im_end|>")
    assert spec.names() == [name for name, _ in spec.build(0).named_tensors()]
    assert spec.names()[0] == "model.embed_tokens.token_delta" and spec.names()[-1] == "lm_head.token_delta"
    assert spec.parameters - plain.parameters == 2 * 3 * 64 == spec.counts(base).by_part["tokens"]
    assert make_plan(config, 1, base=base).trainable_parameters == spec.parameters
    stored = stored_adapters(spec.describe(), "here")
    assert stored.tokens == spec.tokens and spec.difference(spec.describe()) is None
    assert spec.difference(plain.describe()).startswith("method.train_tokens: got [1, 2, 319], must be none")
    other = make_spec(tuned(tiny_llama, tmp_path, [1, 2]), base)
    assert other.difference(spec.describe()).startswith("method.train_tokens: got [1, 2], must be [1, 2, 319]")


@pytest.mark.parametrize(
    "tokens, reason",
    [
        ([], "at least one"),
        ("all", "whole tables"),
        (["a", "b", "a"], "twice"),
        ([3, 3], "twice"),
        ([True], "must be"),
        (3, "must be"),
    ],
)
def test_lists_that_are_refused_before_the_model_is_read(tmp_path, tokens, reason):
    with pytest.raises(UserError, match=rf"^method\.train_tokens.*{reason}"):
        tuned(tmp_path, tmp_path, tokens)


def test_a_side_network_has_no_use_for_tokens(tmp_path):
    config = tiny_config(tmp_path, tmp_path / "run", method={"name": "qst"})
    with pytest.raises(UserError, match=r"^method\.train_tokens: qst does not use it.*the gradient .* base"):
        change_config(config, {"method.train_tokens": ["a"]})


@pytest.mark.parametrize(
    "tokens, reason",
    [
        (["<|im_begin|>"], "token of the tokenizer"),
        ([320], "rows 0 to 319"),
        ([-1], "rows 0 to 319"),
        ([1, "<|im_start|>"], "both are row 1"),
    ],
)
def test_tokens_that_the_base_has_not(tiny_llama, tmp_path, tokens, reason):
    config = tuned(tiny_llama, tmp_path, tokens)
    with pytest.raises(UserError, match=rf"^method\.train_tokens: got .*, must be .*{reason}"):
        make_plan(config, 1)


def test_a_base_with_a_norm_behind_its_embedding_is_refused(tiny_llama, tmp_path):
    """The rows' gradient is taken behind the embedding, where the norm's derivative would be missing from it."""
    config = tuned(tiny_llama, tmp_path, [1])
    base = planned_base(config)
    base.embedding.follow("norm", torch.nn.RMSNorm(64))
    with pytest.raises(UserError, match=r"^method\.train_tokens: the embedding of llama has norm behind its rows"):
        make_spec(config, base)


def test_stock_models_have_the_tables_under_these_names(folder_of):
    """The names in an adapter's file are those of transformers' model."""
    base = open_base(folder_of("opt"))
    stock = AutoModelForCausalLM.from_pretrained(folder_of("opt"))
    assert {f"{path}.weight" for path in tokens_in(base).tables} <= stock.state_dict().keys()
