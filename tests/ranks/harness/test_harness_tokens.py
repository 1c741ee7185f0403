"""Tokens of a task's texts: one token that begins them, whether the chat template or the tokenizer writes it."""

import datetime
from types import SimpleNamespace

import pytest
import torch
from tokenizers.processors import TemplateProcessing

import dist_qft
from dist_qft.harness.model import TunedLM
from tests.support.tiny_model import tiny_tokenizer

BEGIN = "<|im_start|>"  # which the template, too, begins with


@pytest.fixture(scope="module")
def begun(make_run, tiny_llama):
    """A model whose tokenizer puts BOS before every text, as those of Llama 3 and Gemma do, with its `logits`."""
    loaded = dist_qft.load(make_run(tiny_llama, size=0.5))
    tokenizer = tiny_tokenizer()
    special = [(BEGIN, tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{BEGIN} $A", special_tokens=special)
    return TunedLM(loaded.base, tokenizer, 2), loaded.logits


def asked(*arguments):
    return [SimpleNamespace(args=arguments)]


def plain(model: TunedLM, text: str) -> list[int]:
    return model.tokenizer.encode(text, add_special_tokens=False)


def scored(logits, ids: list[int], count: int) -> float:
    """The log-likelihood of the last `count` of `ids`."""
    own = logits(torch.tensor([ids[:-1]]))[0, -count:].log_softmax(-1)
    return float(own.gather(1, torch.tensor(ids[-count:])[:, None]).sum())


def test_a_templated_text_begins_once(begun):
    model, logits = begun
    begin = model.tokenizer.bos_token_id
    templated = model.apply_chat_template([{"role": "user", "content": "Say the 1:"}])
    ids = plain(model, templated)
    assert ids[0] == begin and begin not in plain(model, "Say the 1:")
    assert model.tok_encode(templated) == ids
    assert model.tok_encode("Say the 1:") == [begin, *plain(model, "Say the 1:")]
    targets = plain(model, " sea")
    ((value, _),) = model.loglikelihood(asked(templated + "The", " sea"))
    assert value == pytest.approx(scored(logits, ids + plain(model, "The") + targets, len(targets)), abs=1e-4)


def test_a_template_prints_the_date_of_the_run_and_writes_an_answer_as_far_as_it_goes(begun):
    model, _ = begun
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d') }}\n" + tokenizer.chat_template
    dated = TunedLM(model.base, tokenizer, 2, today=datetime.date(2025, 3, 9))
    asked = [{"role": "user", "content": "Say the 1:"}]
    text = dated.apply_chat_template(asked)
    assert text.startswith("2025-03-09\n") and text.endswith("assistant\n")
    begun_answer = [*asked, {"role": "assistant", "content": "The sea"}]
    assert dated.apply_chat_template(begun_answer, add_generation_prompt=False) == text + "The sea"


@pytest.mark.parametrize("begins", ["", BEGIN])
def test_rolling_texts_begin_once(begun, begins):
    model, logits = begun
    ids = plain(model, BEGIN + "Say the 1:")
    (value,) = model.loglikelihood_rolling(asked(begins + "Say the 1:"))
    assert value == pytest.approx(scored(logits, ids, len(ids) - 1), abs=1e-4)


def test_generation_goes_on_from_a_templated_text(begun):
    model, _ = begun
    templated = model.apply_chat_template([{"role": "user", "content": "Say the 1:"}])
    seen: list[list[int]] = []
    handle = model.base.embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten().tolist()))
    model.generate_until(asked(templated, {"max_gen_toks": 1}))
    handle.remove()
    assert seen == [plain(model, templated)]
