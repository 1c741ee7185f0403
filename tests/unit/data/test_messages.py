"""Messages in the forms of other programs: what they become, and what a misfit is told."""

import pytest

from dist_qft.data.formats import to_sample
from dist_qft.data.samples import Conversation, PromptCompletion
from dist_qft.errors import UserError

WHERE = "data.jsonl:7"
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


ACCEPTED = {
    "conversations with roles": (
        "sharegpt",
        {"conversations": [user("a"), {"role": "Assistant", "content": "b"}]},
        Conversation([user("a"), assistant("b")]),
    ),
    "roles of other programs": (
        "messages",
        {
            "messages": [
                {"role": "developer", "content": "s"},
                user("a"),
                {"role": "ipython", "content": "1"},
                {"role": "function", "content": "2", "name": "f"},
                {"role": "model", "content": "b"},
            ]
        },
        Conversation(
            [
                {"role": "developer", "content": "s"},
                user("a"),
                {"role": "tool", "content": "1"},
                {"role": "tool", "content": "2", "name": "f"},
                assistant("b"),
            ]
        ),
    ),
    "contents of text parts": (
        "messages",
        {
            "messages": [
                user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
                assistant([{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "c"}]),
            ]
        },
        Conversation([user("ab"), {"role": "assistant", "reasoning_content": "t", "content": "c"}]),
    ),
    "results that are no texts": (
        "messages",
        {
            "messages": [
                user("a"),
                *({"role": "tool", "content": result} for result in ({"\xb0C": 2}, [{"t": 2}, None], 2.5, False)),
                assistant("b"),
            ]
        },
        Conversation(
            [
                user("a"),
                *({"role": "tool", "content": text} for text in ('{"\xb0C": 2}', '[{"t": 2}, null]', "2.5", "false")),
                assistant("b"),
            ]
        ),
    ),
    "two spellings in one set": (
        "sharegpt",
        {
            "conversations": [
                {"role": "user", "content": "a", "from": None, "value": None},
                {"role": None, "content": None, "from": "gpt", "value": "b"},
            ]
        },
        Conversation([user("a"), assistant("b")]),
    ),
    "arguments as text stay text": (
        "messages",
        {"messages": [user("a"), {"role": "assistant", "tool_calls": [{"name": "add", "arguments": '{"a": 1}'}]}]},
        Conversation(
            [
                user("a"),
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}],
                },
            ]
        ),
    ),
    "parallel calls in one entry and in two": (
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "function_call", "value": '[{"name": "add", "arguments": {"a": 1}}]'},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            ],
            "tools": [{"name": "add", "parameters": {}}],
        },
        Conversation([user("a"), {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}], [TOOL]),
    ),
    "weights": (
        "messages",
        {
            "messages": [
                user("a"),
                assistant("b") | {"weight": 0},
                user("c"),
                assistant("d") | {"train": False},
                user("e"),
                assistant("f") | {"weight": 1},
            ]
        },
        Conversation(
            [
                user("a"),
                assistant("b") | {"weight": 0},
                user("c"),
                assistant("d") | {"weight": 0},
                user("e"),
                assistant("f"),
            ]
        ),
    ),
    "weights under other names": (
        "messages",
        {"messages": [user("a"), assistant("b") | {"training": False}, user("c"), assistant("d") | {"loss": False}]},
        Conversation([user("a"), assistant("b") | {"weight": 0}, user("c"), assistant("d") | {"weight": 0}]),
    ),
    "a system field, and functions": (
        "messages",
        {"messages": [user("a"), assistant("b")], "system": "s", "functions": [{"name": "f"}]},
        Conversation(
            [{"role": "system", "content": "s"}, user("a"), assistant("b")],
            [{"type": "function", "function": {"name": "f"}}],
        ),
    ),
    "a system field that the messages begin with": (
        "messages",
        {"messages": [{"role": "system", "content": "s"}, user("a"), assistant("b")], "system": "s"},
        Conversation([{"role": "system", "content": "s"}, user("a"), assistant("b")]),
    ),
    "calls without arguments": (
        "messages",
        {
            "messages": [
                user("a"),
                {
                    "role": "assistant",
                    "tool_calls": [{"name": "f", "arguments": ""}, {"name": "g", "arguments": None}],
                },
            ]
        },
        Conversation(
            [
                user("a"),
                assistant("")
                | {
                    "tool_calls": [
                        {"type": "function", "function": {"name": name, "arguments": {}}} for name in ("f", "g")
                    ]
                },
            ]
        ),
    ),
    "a prompt that its answer begins with": (
        "prompt-completion",
        {"prompt": "a", "completion": [user("a"), assistant("b")]},
        Conversation([user("a"), assistant("b")], prompt_length=1),
    ),
    "the last question of a prompt that its answer begins with": (
        "prompt-completion",
        {"prompt": "c", "completion": [user("a"), assistant("b"), user("c"), assistant("d")]},
        Conversation([user("a"), assistant("b"), user("c"), assistant("d")], prompt_length=3),
    ),
    "prompt and completion as messages": (
        "prompt-completion",
        {"prompt": [user("a")], "completion": [assistant("b")]},
        Conversation([user("a"), assistant("b")], prompt_length=1),
    ),
    "prompt and completion as JSON text of messages": (
        "prompt-completion",
        {"prompt": '[{"role": "user", "content": "a"}]', "completion": '[ {"from": "gpt", "value": "b"}]'},
        Conversation([user("a"), assistant("b")], prompt_length=1),
    ),
    "a system field beside a prompt and completion": (
        "prompt-completion",
        {"prompt": [user("a")], "completion": "b", "system": "s"},
        Conversation([{"role": "system", "content": "s"}, user("a"), assistant("b")], prompt_length=2),
    ),
    "a system field that the prompt begins with": (
        "prompt-completion",
        {"prompt": [{"role": "system", "content": "s"}, user("a")], "completion": "b", "system": "s"},
        Conversation([{"role": "system", "content": "s"}, user("a"), assistant("b")], prompt_length=2),
    ),
    **{
        f"texts that are no messages: {text}": (
            "prompt-completion",
            {"prompt": "a", "completion": text},
            PromptCompletion("a", text),
        )
        for text in ('[{"name": "f"}]', "[{'name': 'f'}]", '[{"a": "user"', "[]", '[{"role": "user"}, 1]')
    },
}


@pytest.mark.parametrize(("format_name", "record", "sample"), ACCEPTED.values(), ids=ACCEPTED)
def test_record_becomes_sample(format_name, record, sample):
    assert to_sample(record, format_name, {}, WHERE) == sample


REFUSED = {
    "an image among the parts": (
        "messages",
        {"messages": [user([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}])]},
        "field 'messages' entry 0 has a part of type 'image_url', must be text",
    ),
    "pictures beside the messages": (
        "messages",
        {"messages": [user("<image>"), assistant("b")], "images": ["x.png"]},
        "field 'images' is not supported",
    ),
    "settings of the template": (
        "messages",
        {"messages": [user("a"), assistant("b")], "chat_template_kwargs": {"enable_thinking": False}},
        "field 'chat_template_kwargs' is not supported",
    ),
    "arguments that are no object": (
        "messages",
        {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}]},
        "field 'messages' entry 0 'arguments' must be an object: got '[1]'",
    ),
    "an answer that is no text": (
        "messages",
        {"messages": [user("a"), {"role": "assistant", "content": {"t": 2}}]},
        "field 'messages' entry 1 'content' must be a string, not dict",
    ),
    "a weight between": (
        "messages",
        {"messages": [user("a"), assistant("b") | {"weight": 0.5}]},
        "field 'messages' entry 1 has a weight of 0.5, must be 0 or 1",
    ),
}


@pytest.mark.parametrize(("format_name", "record", "message"), REFUSED.values(), ids=REFUSED)
def test_misfit_names_place_field_and_entry(format_name, record, message):
    with pytest.raises(UserError) as caught:
        to_sample(record, format_name, {}, WHERE)
    assert str(caught.value).startswith(f"{WHERE}: {message}")
    assert caught.value.exit_code == 2
