"""Answers: batches as one by one, sampling, ends, and conversations on one rank and on two."""

import io
import shutil
import sys
from pathlib import Path

import pytest
import torch

import dist_qft
from dist_qft import chat
from dist_qft.chat import Chat, shared_lines
from dist_qft.config.schema import EvaluationConfig
from dist_qft.errors import Preempted, SetupError, UserError
from dist_qft.tuned_model import answer
from dist_qft.tuned_model.answer import Sampling, _left_padded, _text, answers, require_room_for_answers
from dist_qft.tuned_model.checkpointed import config_of, find_checkpoint, open_checkpointed
from dist_qft.tuned_model.prompts import prompt_ids
from tests.support.tiny_model import tiny_tokenizer

PROMPTS = ["Say cat 3:", "the quiet sea had left what the dogs ran over", "a"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(make_run, tiny_llama):
    return make_run(tiny_llama, size=0.2)


@pytest.fixture(scope="module")
def model(run):
    return dist_qft.load(run, dtype="float32")


def test_a_batch_gives_the_answers_of_its_prompts_alone(model):
    together = model.generate(PROMPTS, max_new_tokens=12)
    assert together == [model.generate(prompt, max_new_tokens=12) for prompt in PROMPTS]
    assert len(set(together)) == len(PROMPTS)


class AskedAtTheThird:
    """A stop signal that comes behind the second token."""

    def __init__(self):
        self.asked = 0

    def any_rank(self):
        self.asked += 1
        return self.asked == 3


def test_a_signal_ends_the_answers_at_the_next_token(model):
    stop, sampling = AskedAtTheThird(), Sampling(max_new_tokens=12)
    with pytest.raises(Preempted, match=r"^stopped by a signal during an answer$"):
        answers(model.base, model.tokenizer, PROMPTS, sampling, CPU, stop=stop)
    assert stop.asked == 3
    unasked = answers(model.base, model.tokenizer, PROMPTS, sampling, CPU)
    assert answers(model.base, model.tokenizer, PROMPTS, sampling, CPU, stop=stop) == unasked


def test_the_text_of_an_answer_in_channels_is_that_of_the_last():
    tokenizer = tiny_tokenizer()
    said = "<|channel|>analysis<|message|>The dogs.<|end|><|start|>assistant<|channel|>final<|message|>Hello."
    plain = tokenizer(said, add_special_tokens=False)["input_ids"]
    assert _text(tokenizer, plain) == said  # words, where they are no tokens of their own
    tokenizer.add_tokens([f"<|{name}|>" for name in ("channel", "message", "end", "start")], special_tokens=True)
    ids = tokenizer(said, add_special_tokens=False)["input_ids"]
    assert _text(tokenizer, ids) == "Hello."
    assert _text(tokenizer, ids[: ids.index(tokenizer.convert_tokens_to_ids("<|end|>"))]) == "The dogs."
    assert _text(tokenizer, tokenizer("Hello.")["input_ids"]) == "Hello."


@pytest.mark.parametrize(("kind", "sizes"), [("llama", [3]), ("rwkv", [1, 1, 1])])
def test_prompts_are_answered_one_by_one_where_padding_counts(model, monkeypatch, kind, sizes):
    seen = []
    monkeypatch.setattr(model.base.config, "model_type", kind, raising=False)
    monkeypatch.setattr(
        answer, "_answer_batch", lambda base, tokenizer, ids, *_: seen.append(len(ids)) or [""] * len(ids)
    )
    assert answers(model.base, model.tokenizer, PROMPTS, Sampling(), CPU) == [""] * 3
    assert seen == sizes


def test_sampling_is_a_function_of_its_seed(model):
    state = torch.random.get_rng_state()
    drawn = [model.generate(PROMPTS[0], 12, temperature=3.0, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2] != model.generate(PROMPTS[0], 12)
    assert torch.equal(state, torch.random.get_rng_state())
    greedy = model.generate(PROMPTS[0], 12)
    assert model.generate(PROMPTS[0], 12, temperature=0.5, top_k=1) == greedy
    assert model.generate(PROMPTS[0], 12, temperature=0.5, top_p=1e-6) == greedy


def test_an_answer_longer_than_the_models_positions_is_refused(model):
    limit = model.base.config.max_position_embeddings
    length = len(prompt_ids(model.tokenizer, PROMPTS[0]))
    with pytest.raises(UserError, match=f"^max_new_tokens: got {limit}, must be at most {limit - length}: "):
        model.generate(PROMPTS[0], limit)
    with pytest.raises(UserError, match=r"^prompt: got .* tokens, must be fewer than the model's"):
        model.generate("a " * limit, 1)
    with pytest.raises(UserError, match=rf"^evaluation\.max_new_tokens: got {limit}, must be at most"):
        asked = EvaluationConfig(prompts=PROMPTS, max_new_tokens=limit)
        require_room_for_answers(asked, model.base, model.tokenizer, None)


def test_a_prompt_without_a_token_is_refused_before_weights_are_loaded(shell, make_run, tiny_llama, tmp_path):
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    (base / "chat_template.jinja").unlink()  # with a template no prompt is empty
    run = make_run(base)
    model = dist_qft.load(run)
    assert prompt_ids(model.tokenizer, "") == []
    for prompts in ("", ["a", ""]):
        with pytest.raises(UserError, match=r"^prompt: got '', 0 tokens"):
            model.generate(prompts)
    with pytest.raises(UserError, match=r"^evaluation\.prompts: got '', 0 tokens"):
        require_room_for_answers(EvaluationConfig(prompts=["a", ""]), model.base, model.tokenizer, None)
    weights = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(weights[:-256] + bytes(256))
    assert "trained on base" in shell("generate", run, "--prompt", "a")[2]
    code, out, err = shell("generate", run, "--prompt", "")
    assert (code, out) == (2, "") and err.startswith("error: prompt: got ''") and err.count("\n") == 1
    ids, mask = _left_padded([[], []], 0)
    assert ids.dtype == mask.dtype == torch.int64


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p"),
        ({"temperature": 1.0, "top_k": -1}, "top_k"),
        ({"seed": -1}, "seed"),
        ({"top_p": 0.5}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_sampling_that_makes_no_sense_is_refused_by_name(settings, name):
    with pytest.raises(UserError, match=f"^{name}"):
        Sampling(**settings)


@pytest.mark.parametrize(("arguments", "key"), [({"device": "tpu"}, "device"), ({"dtype": "float64"}, "dtype")])
def test_devices_and_dtypes_are_checked(run, arguments, key):
    with pytest.raises(UserError, match=f"^{key}"):
        dist_qft.load(run, **arguments)
    assert dist_qft.load(run, dtype=torch.bfloat16).base.dtype == torch.bfloat16


def test_an_answer_ends_at_any_token_that_the_files_call_an_end(model, monkeypatch):
    whole = model.generate(PROMPTS[1], max_new_tokens=8)
    prompt = torch.tensor([prompt_ids(model.tokenizer, PROMPTS[1])])
    first = int(model.logits(prompt)[0, -1].argmax())
    other = 1 if first == 0 else 0
    monkeypatch.setattr(model.base.model.generation_config, "eos_token_id", [other, first])
    assert model.generate(PROMPTS[1], max_new_tokens=8) == model.tokenizer.decode([first]).strip() != whole


LINES = ["hello cat", "/base", "/nothing", "", "and the sea?", "/reset", "/system be brief", "hello cat", "/exit", "x"]


def talk(run: str) -> tuple[str, list]:
    config = config_of(find_checkpoint(run))
    parts, tokenizer = open_checkpointed(find_checkpoint(run), config, CPU)
    output, lines = io.StringIO(), iter(LINES)
    talking = Chat(parts.base, tokenizer, parts.trainables, CPU, Sampling(6), output=output)
    turns = []
    for line in shared_lines(lambda: next(lines, None), CPU):
        if not talking.take(line):
            break
        turns.append(len(talking.turns))
    return output.getvalue(), turns


def test_a_conversation_is_the_same_on_one_rank_and_on_two(pools, run, model):
    (alone, turns), *_ = pools[1].run(talk, run=run)
    (shared, shared_turns), (other, other_turns) = pools[2].run(talk, run=run)
    assert alone == shared == other and turns == shared_turns == other_turns
    assert turns == [2, 2, 2, 2, 4, 0, 0, 2]
    lines = alone.splitlines()
    assert lines[0].strip() == model.generate("hello cat", 6) and lines[1] != lines[0]
    assert lines[2].startswith("(unknown command /nothing") and lines[4] == lines[5] == "(a new conversation)"


def test_the_command_reads_a_pipe(shell, run, monkeypatch, model):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello cat\n/exit\n"))
    code, out, _ = shell("chat", run, "--max-new-tokens", 6)
    assert code == 0 and out.strip() == model.generate("hello cat", 6)
    code, _, err = shell("chat", run, "--temperature", "-1")
    assert code == 2 and "temperature" in err


def heard(content: bytes | None) -> list[str] | str:
    """The lines of an input of these bytes on this rank, or the failure; None closes the input."""
    sys.stdin = io.TextIOWrapper(io.BytesIO(content or b""), encoding="utf-8")
    if content is None:
        sys.stdin.close()
    try:
        chat._prepare_input()
        return list(shared_lines(lambda: chat._read(False), CPU))
    except SetupError as error:
        return str(error)


def test_an_input_that_cannot_be_read_ends_the_chat_on_every_rank(pools, shell, run, monkeypatch):
    assert pools[2].run(heard, content=b"caf\xe9\nb\n") == [["caf\ufffd\n", "b\n"]] * 2
    failures = pools[2].run(heard, content=None)
    assert failures[0] == failures[1] and failures[0].startswith("standard input: cannot be read: ")
    monkeypatch.setattr(sys, "stdin", None)
    code, _, err = shell("chat", run)
    assert code == 3 and "standard input: it is closed" in err and err.count("\n") == 1
