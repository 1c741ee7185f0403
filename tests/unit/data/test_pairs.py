"""Pairs and rated answers in TRL's forms: from records to the rows of a micro-batch."""

import json

import numpy as np
import pytest

from dist_qft.config.data_schema import DataConfig, DatasetConfig, TaskConfig
from dist_qft.data.batches import Batches, collate, eval_batches
from dist_qft.data.dataset import TokenDataset
from dist_qft.data.prepare import prepare
from dist_qft.errors import UserError
from tests.support.tiny_model import tiny_tokenizer

USER = [{"role": "user", "content": "the cat"}]


def answer(text):
    return [{"role": "assistant", "content": text}]


FORMS = {
    "texts": {"prompt": "the cat", "chosen": " sat on a mat", "rejected": " ran"},
    "texts with their prompt": {"chosen": "the cat sat on a mat", "rejected": "the cat ran"},
    "messages": {"prompt": USER, "chosen": answer("sat on a mat"), "rejected": answer("ran")},
    "messages with their prompt": {"chosen": USER + answer("sat on a mat"), "rejected": USER + answer("ran")},
    "messages with their prompt twice": {
        "prompt": USER,
        "chosen": USER + answer("sat on a mat"),
        "rejected": USER + answer("ran"),
    },
    "a text that the messages hold": {
        "prompt": "the cat ",
        "chosen": USER + answer("sat on a mat"),
        "rejected": USER + answer("ran"),
    },
    "JSON text of messages": {
        "prompt": json.dumps(USER),
        "chosen": json.dumps(USER + answer("sat on a mat")),
        "rejected": json.dumps([{"from": "gpt", "value": "ran"}]),
    },
    "JSON text of messages with their prompt": {
        "chosen": json.dumps(USER + answer("sat on a mat"), indent=1),
        "rejected": json.dumps(USER + answer("ran"), indent=1),
    },
    "a text beside messages": {"prompt": "the cat", "chosen": answer("sat on a mat"), "rejected": "ran"},
}


def prepared(folder, rows, task="dpo", **data):
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(train=DatasetConfig(path=str(path), **data.pop("dataset", {})), **data)
    return prepare(config, tiny_tokenizer(), 320, folder / "cache", TaskConfig(name=task)).train


def answers(dataset, row):
    """The predicted text of a pair's two answers."""
    batch = collate(dataset, [row], 1, 0)
    return [tiny_tokenizer().decode(targets[targets != -100]) for targets in batch.targets]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_pair(tmp_path, form):
    dataset = prepared(tmp_path, [FORMS[form]])
    assert dataset.kind == "pairs" and len(dataset) == 1 and dataset.counts["rows"] == 1
    first, second = answers(dataset, 0)
    assert first.strip().removesuffix("<|im_end|>").strip().removesuffix("<|im_end|>") == "sat on a mat"
    assert second.strip().removesuffix("<|im_end|>").strip().removesuffix("<|im_end|>") == "ran"
    assert tiny_tokenizer().decode(dataset.tokens).count("the cat") == 2
    assert TokenDataset.load(next((tmp_path / "cache").glob("*.safetensors"))).kind == "pairs"


@pytest.mark.parametrize("form", ["texts with their prompt", "messages with their prompt"])
def test_a_question_that_the_answers_begin_with_may_stand_beside_them(tmp_path, form):
    dataset = prepared(tmp_path, [{**FORMS[form], "question": "the cat", "input": ""}])
    assert [text.split("<")[0].strip() for text in answers(dataset, 0)] == ["sat on a mat", "ran"]
    row = {"question": "seven", "chosen": "the cat sat", "rejected": "the cat ran"}
    named = prepared(tmp_path, [row], dataset={"columns": {"prompt": "question"}})
    assert tiny_tokenizer().decode(named.tokens).count("seven") == 2
    assert [text.removesuffix("<|im_end|>") for text in answers(named, 0)] == ["the cat sat", "the cat ran"]


@pytest.mark.parametrize("form", ["messages", "messages with their prompt", "a text that the messages hold"])
def test_a_system_field_stands_before_both_answers(tmp_path, form):
    dataset = prepared(tmp_path, [{**FORMS[form], "system": "be kind"}])
    assert tiny_tokenizer().decode(dataset.tokens).count("system\nbe kind") == 2
    assert [text.split("<")[0].strip() for text in answers(dataset, 0)] == ["sat on a mat", "ran"]


@pytest.mark.parametrize("task", ["dpo", "orpo", "kto"])
@pytest.mark.parametrize("prompt", ["the cat", " the cat\n", "seven dogs"])
def test_turns_that_both_answers_have_are_not_compared_beside_a_text_prompt(tmp_path, task, prompt):
    earlier = USER + answer("fox") + [{"role": "user", "content": "seven dogs"}]
    sides = [earlier + answer("sat"), earlier + answer("ran")]
    pair = {"prompt": prompt, "chosen": sides[0], "rejected": sides[1]}
    rated = [{"prompt": prompt, "completion": side, "label": i == 0} for i, side in enumerate(sides)]
    for number, rows in enumerate([[pair], rated] if task == "kto" else [[pair]]):
        (folder := tmp_path / str(number)).mkdir()
        dataset = prepared(folder, rows, task)
        said = tiny_tokenizer().decode(dataset.tokens[dataset.targets])
        assert said.split("<|im_end|>") == ["sat", "ran", ""]
        assert tiny_tokenizer().decode(dataset.tokens).count("fox") == 2


def test_answers_part_where_they_differ_beside_a_text_prompt(tmp_path):
    again = [{"role": "user", "content": "seven dogs"}]
    sides = [USER + answer(first) + again + answer(second) for first, second in (("fox", "sat"), ("mat", "ran"))]
    dataset = prepared(tmp_path, [{"prompt": "the cat", "chosen": sides[0], "rejected": sides[1]}])
    assert [text.split("<")[0] for text in answers(dataset, 0)] == ["fox", "mat"]
    assert (
        tiny_tokenizer().decode(dataset.tokens[dataset.targets])
        == "fox<|im_end|>sat<|im_end|>mat<|im_end|>ran<|im_end|>"
    )


def test_rows_of_pairs_lie_in_halves_and_fill_up(tmp_path):
    dataset = prepared(tmp_path, [FORMS["texts"], FORMS["messages"], FORMS["texts"]], task="orpo")
    batch = collate(dataset, [1, 0], 3, 0, share=0.5)
    assert batch.input_ids.shape[0] == 6 and batch.answers.count == batch.num_terms == 2
    assert batch.input_ids[2].unique().tolist() == batch.input_ids[5].unique().tolist() == [dataset.pad_id]
    lengths = (batch.targets != -100).sum(1).tolist()
    halves = np.diff([*dataset.segment_starts, len(dataset.tokens)])
    # The better answers are trained on with their prompts, but for the first token.
    assert lengths[:2] == [halves[2] - 1, halves[0] - 1] and 0 < lengths[3] < halves[3] - 1
    in_answer = batch.answers.in_answer
    assert len(in_answer) == batch.num_targets and in_answer.sum() == int(dataset.targets[: halves[:4].sum()].sum())
    (step,) = Batches(dataset, 0, 3, 3, 0, 1, 3).micro_batches(0)
    assert step.answers.share == pytest.approx(3 / (halves[::2] - 1).sum())
    (whole,) = eval_batches(dataset, 3, 0, 1)
    assert whole.answers.share == step.answers.share


def test_rated_answers_are_put_behind_each_others_prompts(tmp_path):
    rows = [
        {"prompt": "the cat", "completion": " sat", "label": True},
        {"prompt": "seven dogs", "completion": " ran over hills", "label": False},
    ]
    dataset = prepared(tmp_path, rows, task="kto")
    assert dataset.kind == "rated-with-kl" and dataset.labels.tolist() == [1.0, 0.0]
    batch = collate(dataset, [0, 1], 2, 0)
    assert batch.answers.desirable.tolist() == [True, False] and batch.answers.cycled == 2
    texts = [tiny_tokenizer().decode(row, skip_special_tokens=True) for row in batch.input_ids]
    assert texts == ["the cat sat", "seven dogs ran over hills", "the cat ran over hills", "seven dogs sat"]
    alone = collate(dataset, [0], 2, 0)
    assert alone.answers.cycled == 0 and alone.num_terms == 1
    split = prepared(tmp_path, [FORMS["texts"]], task="kto")
    assert len(split) == 2 and split.labels.tolist() == [1.0, 0.0]


def test_no_answer_is_measured_behind_the_prompt_that_it_answers(tmp_path):
    """Two answers to a prompt that stand side by side, as those of one length do in held-out rows."""
    said = [
        ("the cat", " sat"),
        ("the cat", " ran"),
        ("seven dogs", " sat on a mat"),
        ("seven dogs", " ran over hills"),
    ]
    rows = [{"prompt": prompt, "completion": text, "label": True} for prompt, text in said]
    dataset = prepared(tmp_path, rows, task="kto")
    batch = collate(dataset, [0, 1, 2, 3], 5, 0)
    assert batch.answers.cycled == 4
    texts = [tiny_tokenizer().decode(row, skip_special_tokens=True) for row in batch.input_ids]
    assert texts[:4] == [prompt + text for prompt, text in said]
    behind = ["the cat ran over hills", "the cat ran over hills", "seven dogs ran", "seven dogs ran"]
    assert texts[5:9] == behind
    same = collate(dataset, [0, 1], 2, 0)
    assert same.answers.cycled == 0 and same.answers.count == 2


@pytest.mark.parametrize(
    "row, task, reason",
    [
        ({"prompt": "a", "chosen": "b"}, "dpo", "'rejected' is missing"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "dpo", "is the same as the chosen answer"),
        ({"chosen": "one", "rejected": "two"}, "orpo", "no prompt in common"),
        *(
            (
                {"chosen": "the cat sat", "rejected": "the cat ran", field: question},
                "dpo",
                f"does not hold the prompt, which seems to be the field '{field}'; set columns: {{prompt: {field}}}",
            )
            for field, question in [
                ("instruction", "what?"),
                ("question", "what?"),
                ("query", "what?"),
                ("input", "what?"),
                ("conversations", [{"from": "human", "value": "what?"}]),
            ]
        ),
        ({"chosen": "one", "rejected": "two", "question": "a"}, "dpo", "columns: {prompt: question}"),
        ({"chosen": answer("x"), "rejected": answer("y"), "question": "a"}, "dpo", "columns: {prompt: question}"),
        ({"chosen": USER + answer("x"), "rejected": "y"}, "dpo", "must be a text or a list of messages"),
        ({"prompt": "a", "chosen": USER + answer("x"), "rejected": answer("y")}, "dpo", "another question"),
        ({"prompt": "a", "chosen": str(answer("x")), "rejected": "y"}, "dpo", "Python's own quotes are not JSON"),
        ({"chosen": str(USER + answer("x")), "rejected": "y"}, "dpo", "Python's own quotes are not JSON"),
        ({"prompt": "a", "chosen": '[{"role": "user",', "rejected": "y"}, "dpo", "must be a text, a list of messages"),
        ({"prompt": "[{'from': 'human'}]", "completion": "y", "label": 1}, "kto", "Python's own quotes are not JSON"),
        ({"prompt": "a", "completion": "b", "label": "good"}, "kto", "'label' must be true or false"),
        ({**FORMS["texts"], "system": "s"}, "dpo", "'system' has no place beside a text prompt"),
        ({**FORMS["texts with their prompt"], "system": "s"}, "orpo", "'system' has no place beside a text prompt"),
        ({"prompt": "a", "completion": "b", "label": 1, "system": "s"}, "kto", "'system' has no place"),
        ({"prompt": "a", "completion": "b"}, "kto", "fit no format"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "causal-lm", "task.name dpo or orpo"),
    ],
)
def test_rows_that_cannot_be_compared_are_refused_at_their_line(tmp_path, row, task, reason):
    with pytest.raises(UserError) as refusal:
        prepared(tmp_path, [row], task)
    assert str(refusal.value).startswith(f"{tmp_path / 'pairs.jsonl'}:1: ") and reason in str(refusal.value)


def test_a_pair_is_held_out_whole(tmp_path):
    rows = [{"prompt": f"the cat {i}", "chosen": " sat", "rejected": " ran"} for i in range(6)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(train=DatasetConfig(path=str(tmp_path / "pairs.jsonl")), eval_samples=2)
    data = prepare(config, tiny_tokenizer(), 320, tmp_path / "cache", TaskConfig(name="kto"))
    prompts = [
        [tiny_tokenizer().decode(part.row(i).tokens)[len("the cat ")] for i in range(len(part))]
        for part in (data.train, data.eval)
    ]
    assert len(prompts[0]) == 8 and len(prompts[1]) == 4 and data.train.counts["held_out"] == 4
    assert not set(prompts[0]) & set(prompts[1]) and data.eval.labels.tolist() == [1, 0] * 2


@pytest.mark.parametrize("task", ["dpo", "orpo", "kto"])
def test_answers_that_are_the_same_once_cut_are_dropped(tmp_path, task):
    long = {"prompt": "the cat", "chosen": " sat on a mat" * 9 + " yes", "rejected": " sat on a mat" * 9 + " no"}
    dataset = prepared(tmp_path, [FORMS["texts"], long], task, max_length=16)
    assert len(dataset) == (2 if task == "kto" else 1) and dataset.counts["dropped_same_answers"] == 1
    assert any("1 dropped, whose two answers are the same tokens" in note for note in dataset.notes)
    assert len(prepared(tmp_path, [FORMS["texts"], long], task)) == (4 if task == "kto" else 2)


@pytest.mark.parametrize("task", ["dpo", "kto"])
def test_what_happens_to_both_answers_counts_once(tmp_path, task):
    long = {side: f" {side} ran over green hills" * 20 for side in ("chosen", "rejected")}
    rows = [FORMS["texts"], {"prompt": "the cat", **long}]
    cut = prepared(tmp_path, rows, task, max_length=16)
    assert cut.counts["truncated"] == 1 and any("of 2 rows 1 cut to" in note for note in cut.notes)
    assert prepared(tmp_path, rows, task, overlong="drop", max_length=16).counts["dropped_overlong"] == 1


def test_an_answer_too_long_takes_its_pair_along(tmp_path):
    long = {**FORMS["texts"], "rejected": " ran over green hills" * 20}
    dataset = prepared(tmp_path, [FORMS["texts"], long], overlong="drop", max_length=16)
    assert len(dataset) == 1 and dataset.counts["dropped_overlong"] == 1
