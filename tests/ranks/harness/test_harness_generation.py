"""Generation as tasks ask for it: where it stops, what of a long prompt it sees, and sampling."""

from types import SimpleNamespace

import pytest
import torch

import dist_qft
from dist_qft.errors import UserError
from dist_qft.harness.model import TunedLM

PROMPT = "Say the 1:\n"


@pytest.fixture(scope="module")
def loaded(make_run, tiny_llama):
    return dist_qft.load(make_run(tiny_llama, size=0.5))


@pytest.fixture
def model(loaded):
    return TunedLM(loaded.base, loaded.tokenizer)


@pytest.fixture
def prompts(model):
    """The ids of the first pass of each generation, and of every later token."""
    seen: list[list[int]] = []
    handle = model.base.embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten().tolist()))
    yield seen
    handle.remove()


def generated(model: TunedLM, prompt: str, **settings: object) -> str:
    (text,) = model.generate_until([SimpleNamespace(args=(prompt, settings))])
    return text


def test_it_stops_at_a_stop_string_and_not_at_one_that_the_prompt_begins(model, prompts):
    whole = generated(model, PROMPT, max_gen_toks=8)
    across = PROMPT[-1] + whole[0]
    assert across not in whole and len(prompts) == 8
    assert generated(model, PROMPT, max_new_tokens=8, until=across) == whole
    prompts.clear()
    stop = whole[1]
    assert generated(model, PROMPT, max_gen_toks=8, until=["nowhere", stop]) == whole.split(stop)[0]
    assert len(prompts) < 8, "no token behind the stop string is computed"


def test_a_long_prompt_loses_its_beginning_and_none_at_all_is_refused(loaded, prompts):
    model = TunedLM(loaded.base, loaded.tokenizer, max_length=12)
    ids = model.tok_encode("the cat sat on a mat while seven small dogs ran")
    generated(model, "the cat sat on a mat while seven small dogs ran", max_gen_toks=4)
    assert len(ids) > 8 and prompts[0] == ids[-8:]
    prompts.clear()
    requests = [SimpleNamespace(args=("the cat", {"max_gen_toks": most})) for most in (2, 12)]
    with pytest.raises(UserError):
        model.generate_until(requests)
    assert not prompts


def test_an_empty_prompt_is_the_token_that_begins_a_text(model, prompts):
    generated(model, "", max_gen_toks=1)
    assert prompts == [[model.prefix_token_id]]


def test_a_temperature_alone_samples(model):
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(generated(model, PROMPT, max_gen_toks=8, temperature=5.0))
    assert texts[0] == texts[1] != texts[2]


def test_the_model_generates_in_eval_mode_and_keeps_its_own(model):
    model.base.model.train()
    modes: list[bool] = []
    handle = model.base.model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    generated(model, PROMPT, max_gen_toks=2)
    handle.remove()
    assert modes == [False, False] and model.base.model.training
    model.base.model.eval()
