"""A task's `generation_kwargs`, the room that they leave for a prompt, and stop strings in new text."""

import pytest
import torch

from dist_qft.errors import UserError
from dist_qft.harness.generation import Continuing, NewTextStops
from tests.support.tiny_model import tiny_tokenizer

GREEDY = {"do_sample": False}


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, Continuing(256)),
        ({"until": "\n"}, Continuing(256, ("\n",))),
        ({"until": None, "max_gen_toks": 3}, Continuing(3)),
        ({"until": ["\n", "", "Q:"], "max_new_tokens": 5}, Continuing(5, ("\n", "Q:"))),
        ({"max_tokens": "7", "max_new_tokens": 9}, Continuing(9)),
        ({"max_tokens": "7"}, Continuing(7)),
        ({"max_completion_tokens": 8}, Continuing(8)),
        (
            {"temperature": 0.7, "top_p": 0.9},
            Continuing(256, (), {"do_sample": True, "temperature": 0.7, "top_p": 0.9}),
        ),
        ({"do_sample": True, "top_k": 5}, Continuing(256, (), {"do_sample": True, "top_k": 5})),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, Continuing(256)),
        ({"do_sample": True, "temperature": 0.0, "top_p": 0.9}, Continuing(256)),
        ({"num_beams": 10}, Continuing(256, (), {"num_beams": 10, "do_sample": False})),
    ],
    ids=str,
)
def test_settings_are_read_as_the_harness_reads_them(asked, expected):
    before = repr(asked)
    assert Continuing.of(asked) == expected
    assert repr(asked) == before


@pytest.mark.parametrize(
    "asked", [{"max_gen_toks": 0}, {"temperature": None}, {"max_length": 30}, {"colour": 1}], ids=str
)
def test_what_cannot_be_meant_or_done_is_refused(asked):
    with pytest.raises(UserError) as raised:
        Continuing.of(asked)
    assert raised.value.everywhere and str(raised.value).startswith("generation_kwargs: ")


def test_new_tokens_leave_room_for_a_prompt_or_are_refused():
    assert Continuing(30).room(32) == 2
    assert Continuing(31).room(32) == 1
    for most in (32, 33):
        with pytest.raises(UserError) as raised:
            Continuing(most).room(32)
        assert (
            str(raised.value) == f"generation_kwargs: max_gen_toks: got {most}, must be less than the model's 32 tokens"
        )


@pytest.mark.parametrize(
    ("prompt", "new", "stops", "ends"),
    [
        ("the cat\n", "\n", ["\n\n"], False),
        ("the cat\n", "\n\n", ["\n\n"], True),
        ("the cat\n\n", " sat", ["\n\n"], False),
        ("the cat", " sat on a", ["dog", "t o"], True),
        ("the cat", "<|endoftext|>", ["<|endoftext|>"], True),
    ],
)
def test_a_stop_string_counts_in_new_text_alone(prompt, new, stops, ends):
    tokenizer = tiny_tokenizer()
    before, after = tokenizer.encode(prompt), tokenizer.encode(new)
    ids = torch.tensor([before + after, before + tokenizer.encode("a")[:1] * len(after)])
    found = NewTextStops(tokenizer, stops, len(before))(ids, None)
    assert found.tolist() == [ends, False] and found.dtype == torch.bool
