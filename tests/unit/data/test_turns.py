"""Reasoning, parallel calls, repeated turns and marks within messages: what they become, and what a misfit is told."""

import pytest

from dist_qft.data.formats import to_sample
from dist_qft.data.samples import Conversation
from dist_qft.errors import UserError
from tests.support.conversations import WHERE, assistant, call, user

CALL = call("add", a=1)
SYSTEM = {"role": "system", "content": "s"}
ACCEPTED = {
    "reasoning of calls": (
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}', "reasoning_content": "t"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}', "thinking": "t"},
            ],
        },
        Conversation([user("a"), assistant("") | {"reasoning_content": "t", "tool_calls": [CALL, CALL]}]),
    ),
    "parallel calls that are context": (
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "a"},
                *[{"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}', "train": False}] * 2,
            ],
        },
        Conversation([user("a"), assistant("") | {"tool_calls": [CALL, CALL], "weight": 0}]),
    ),
    "reasoning and no content": (
        "messages",
        {"messages": [user("a"), {"role": "assistant", "content": None, "reasoning_content": "t", "images": []}]},
        Conversation([user("a"), assistant("") | {"reasoning_content": "t", "images": []}]),
    ),
    "parts of a question": (
        "messages",
        {"messages": [user([{"type": "text", "text": "a", "train": False}]), assistant("b")]},
        Conversation([user("a"), assistant("b")]),
    ),
    "results that are lists": (
        "messages",
        {
            "messages": [
                user("a"),
                *({"role": "tool", "content": result} for result in (["x", "y"], [], [{"type": "restaurant", "n": 1}])),
                {"role": "tool", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]},
                {"role": "tool", "content": [{"type": "text", "text": "x"}, {"type": "video", "title": "y"}]},
            ]
        },
        Conversation(
            [
                user("a"),
                *(
                    {"role": "tool", "content": text}
                    for text in ('["x", "y"]', "[]", '[{"type": "restaurant", "n": 1}]')
                ),
                {"role": "tool", "content": "xy"},
                {"role": "tool", "content": '[{"type": "text", "text": "x"}, {"type": "video", "title": "y"}]'},
            ]
        ),
    ),
    "a system message beside a column that says the same": (
        "messages",
        {"system": " s\n", "messages": [SYSTEM, user("a"), assistant("b")]},
        Conversation([SYSTEM, user("a"), assistant("b")]),
    ),
    "an answer that begins with the end of its prompt": (
        "prompt-completion",
        {"prompt": [SYSTEM, user("a")], "completion": [user("a"), assistant("b")]},
        Conversation([SYSTEM, user("a"), assistant("b")], prompt_length=2),
    ),
    "an answer that begins with several turns of its prompt": (
        "prompt-completion",
        {
            "prompt": [SYSTEM, user("a"), assistant("b"), user("a")],
            "completion": [user("a"), assistant("b"), user("a"), assistant("c")],
        },
        Conversation([SYSTEM, user("a"), assistant("b"), user("a"), assistant("c")], prompt_length=4),
    ),
    "an answer that goes on with another question": (
        "prompt-completion",
        {"prompt": [user("a"), assistant("b")], "completion": [user("c"), assistant("b")]},
        Conversation([user("a"), assistant("b"), user("c"), assistant("b")], prompt_length=2),
    ),
}


@pytest.mark.parametrize(("format_name", "record", "sample"), ACCEPTED.values(), ids=ACCEPTED)
def test_nothing_of_a_turn_is_lost_or_doubled(format_name, record, sample):
    assert to_sample(record, format_name, {}, WHERE) == sample


REFUSED = {
    "pictures in a message": (
        "messages",
        {"messages": [user("<image>") | {"images": ["x.png"]}, assistant("b")]},
        "field 'messages' entry 0 'images' is not supported; must be empty or absent",
    ),
    "parts of an answer by their characters": (
        "messages",
        {"messages": [user("a"), assistant("b") | {"train_detail": [{"begin_offset": 0, "train": False}]}]},
        "field 'messages' entry 1 'train_detail' is not supported",
    ),
    "parts of an answer": (
        "messages",
        {"messages": [user("a"), assistant([{"type": "text", "text": "b", "train": False}])]},
        "field 'messages' entry 1 has a part that is not trained",
    ),
    "parallel calls of which one is context": (
        "sharegpt",
        {
            "conversations": [
                {"from": "function_call", "value": '{"name": "f"}'},
                {"from": "function_call", "value": '{"name": "g"}', "train": False},
            ]
        },
        "field 'conversations' entry 1 has another weight than the parallel call before it",
    ),
    "reasoning between parallel calls": (
        "sharegpt",
        {
            "conversations": [
                {"from": "function_call", "value": '{"name": "f"}', "reasoning": "t"},
                {"from": "function_call", "value": '{"name": "g"}', "reasoning": "u"},
            ]
        },
        "field 'conversations' entry 1 has reasoning of its own beside a parallel call",
    ),
    "pictures in a result": (
        "messages",
        {"messages": [user("a"), {"role": "tool", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "field 'messages' entry 1 has a part of type 'image_url', must be text",
    ),
    "a system message beside another in a column": (
        "messages",
        {"system": "t", "messages": [SYSTEM, user("a"), assistant("b")]},
        "field 'system' is 't' beside a conversation whose system message is 's'; must be one of them",
    ),
    "no content but a user's": (
        "messages",
        {"messages": [{"role": "user", "content": None, "reasoning": "t"}]},
        "field 'messages' entry 0 'content' must be a string, not NoneType",
    ),
}


@pytest.mark.parametrize(("format_name", "record", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_obeyed_is_refused(format_name, record, message):
    with pytest.raises(UserError) as caught:
        to_sample(record, format_name, {}, WHERE)
    assert str(caught.value).startswith(f"{WHERE}: {message}")
