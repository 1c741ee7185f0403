"""Six formats: what each record means, how `auto` decides, and what a misfit is told."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from dist_qft.config.data_schema import DatasetConfig
from dist_qft.data.formats import FORMATS, resolve_format, to_sample
from dist_qft.data.samples import Conversation, PromptCompletion, Text, Tokenized
from dist_qft.errors import UserError

WHERE = "data.jsonl:7"


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}

ACCEPTED = {
    "alpaca without input": (
        "alpaca",
        {"instruction": "Name a fruit.", "input": "", "output": "Apple."},
        Conversation([user("Name a fruit."), assistant("Apple.")]),
    ),
    "alpaca with everything": (
        "alpaca",
        {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief.", "history": [["Hi", "Hello"]]},
        Conversation(
            [
                {"role": "system", "content": "Be brief."},
                user("Hi"),
                assistant("Hello"),
                user("Add.\n\n1 2"),
                assistant("3"),
            ],
            inputs={3: "1 2"},
        ),
    ),
    "alpaca with nulls for absent fields": (
        "alpaca",
        {"instruction": "a", "input": None, "output": "b", "system": None, "history": None},
        Conversation([user("a"), assistant("b")]),
    ),
    "sharegpt": (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
        Conversation([{"role": "system", "content": "s"}, user("a"), assistant("b")]),
    ),
    "sharegpt with a tool": (
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "1"},
            ],
            "tools": f"[{str(TOOL).replace(chr(39), chr(34))}]",
        },
        Conversation(
            [user("a"), {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "1"}],
            [TOOL],
        ),
    ),
    "messages drop null fields": (
        "messages",
        {"messages": [{"role": "user", "content": "a", "tool_calls": None}, assistant("b")], "tools": []},
        Conversation([user("a"), assistant("b")]),
    ),
    "messages with a call but no content": (
        "messages",
        {"messages": [user("a"), {"role": "assistant", "content": None, "tool_calls": [CALL]}], "tools": [TOOL]},
        Conversation([user("a"), {"role": "assistant", "content": "", "tool_calls": [CALL]}], [TOOL]),
    ),
    "prompt-completion": ("prompt-completion", {"prompt": "1+1=", "completion": "2"}, PromptCompletion("1+1=", "2")),
    "text": ("text", {"text": "a"}, Text("a")),
    "tokenized with labels": (
        "tokenized",
        {"input_ids": [5, 6, 7], "labels": [-100, 6, -100], "attention_mask": [1, 1, 1]},
        Tokenized([5, 6, 7], [False, True, False]),
    ),
    "tokenized without labels": ("tokenized", {"input_ids": [5, 6]}, Tokenized([5, 6], [True, True])),
}


@pytest.mark.parametrize(("format_name", "record", "sample"), ACCEPTED.values(), ids=ACCEPTED)
def test_record_becomes_sample(format_name, record, sample):
    assert to_sample(record, format_name, {}, WHERE) == sample
    assert resolve_format(DatasetConfig(path="x"), (record, WHERE), "data.train") == format_name


def test_columns_rename_fields():
    columns = {"prompt": "question", "completion": "answer"}
    record = {"question": "a", "answer": "b", "id": 3}
    dataset = DatasetConfig(path="x", columns=columns)
    assert resolve_format(dataset, (record, WHERE), "data.train") == "prompt-completion"
    assert to_sample(record, "prompt-completion", columns, WHERE) == PromptCompletion("a", "b")
    with pytest.raises(UserError) as caught:
        to_sample({"question": "a"}, "prompt-completion", columns, WHERE)
    assert str(caught.value) == "data.jsonl:7: field 'answer' is missing; the record has: question"


REFUSED = {
    "missing": ("alpaca", {"instruction": "a"}, "field 'output' is missing; the record has: instruction"),
    "null": ("text", {"text": None}, "field 'text' is null; the record has: text"),
    "wrong type": ("text", {"text": 3}, "field 'text' must be a string, not int; the record has: text"),
    "no fields": ("text", {}, "field 'text' is missing; the record has: no fields"),
    "alpaca history": (
        "alpaca",
        {"instruction": "a", "output": "b", "history": [["a"]]},
        "field 'history' must be a list of [question, answer]; the record has: instruction, output, history",
    ),
    "messages as text": (
        "messages",
        {"messages": "user: hi"},
        "field 'messages' must be a list of objects",
    ),
    "no messages": ("messages", {"messages": []}, "field 'messages' is empty; the record has: messages"),
    "unknown role": (
        "messages",
        {"messages": [{"role": "bot", "content": "a"}]},
        "field 'messages' entry 0 has unknown 'role' 'bot', must be one of system, developer, user",
    ),
    "no content": (
        "messages",
        {"messages": [user("a"), {"role": "assistant"}]},
        "field 'messages' entry 1 'content' must be a string, not NoneType; the record has: messages",
    ),
    "tool call without name": (
        "messages",
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
        "field 'messages' entry 0 calls must be {\"name\": ...",
    ),
    "unknown sender": (
        "sharegpt",
        {"conversations": [{"from": "bard", "value": "a"}]},
        "field 'conversations' entry 0 has unknown 'from' 'bard', must be one of system, developer, user",
    ),
    "sender of a wrong type": (
        "sharegpt",
        {"conversations": [{"from": ["human"], "value": "a"}]},
        "field 'conversations' entry 0 has unknown 'from' ['human']",
    ),
    "no value": (
        "sharegpt",
        {"conversations": [{"from": "human"}]},
        "field 'conversations' entry 0 'content' must be a string, not NoneType",
    ),
    "function call that is no JSON": (
        "sharegpt",
        {"conversations": [{"from": "function_call", "value": "add(1)"}]},
        "field 'conversations' entry 0 calls must be ",
    ),
    "tools": (
        "messages",
        {"messages": [user("a")], "tools": ["add"]},
        "field 'tools' must be a list of",
    ),
    "ids of a wrong type": (
        "tokenized",
        {"input_ids": [1, "2"]},
        "field 'input_ids' must be a list of integers; the record has: input_ids",
    ),
    "ids of booleans": (
        "tokenized",
        {"input_ids": [True]},
        "field 'input_ids' must be a list of integers; the record has: input_ids",
    ),
    "labels of another length": (
        "tokenized",
        {"input_ids": [1, 2, 3], "labels": [1, 2]},
        "field 'labels' has 2 entries, input_ids 3; the record has: input_ids, labels",
    ),
    "labels that are other tokens": (
        "tokenized",
        {"input_ids": [1, 2], "labels": [2, -100]},
        "field 'labels' entry 0 is 2, must be the same as input_ids (1) or -100",
    ),
    "padding": (
        "tokenized",
        {"input_ids": [1, 0, 2], "attention_mask": [1, 0, 1]},
        "field 'attention_mask' has zeros between ones",
    ),
}


@pytest.mark.parametrize(("format_name", "record", "message"), REFUSED.values(), ids=REFUSED)
def test_misfit_names_place_field_and_fields_at_hand(format_name, record, message):
    with pytest.raises(UserError) as caught:
        to_sample(record, format_name, {}, WHERE)
    assert str(caught.value).startswith(f"{WHERE}: {message}")
    assert caught.value.exit_code == 2


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("[" * 5000),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
NAMES = sorted({name for fields in FORMATS.values() for name in fields.required + fields.optional})


@given(st.sampled_from(list(FORMATS)), st.dictionaries(st.sampled_from(NAMES), JSON))
def test_whatever_json_holds_is_a_sample_or_a_one_line_refusal(format_name, record):
    try:
        sample = to_sample(record, format_name, {}, WHERE)
    except UserError as error:
        assert str(error).startswith(f"{WHERE}: ")
        assert "\n" not in str(error) and len(str(error)) < 1000
    else:
        assert isinstance(sample, Conversation | PromptCompletion | Text | Tokenized)


@pytest.mark.parametrize(
    ("record", "columns", "message"),
    [
        ({"instruction": "a", "output": "b", "text": "c"}, {}, "fit alpaca and text; set data.train.format"),
        (
            {"question": "a", "answer": "b"},
            {},
            "the fields question, answer fit no format (alpaca: instruction, output;",
        ),
        ({"text": "a"}, {"txt": "text"}, "data.train.columns: got 'txt', must be a field of text: text"),
    ],
)
def test_auto_says_why_it_cannot_decide(record, columns, message):
    with pytest.raises(UserError) as caught:
        resolve_format(DatasetConfig(path="x", columns=columns), (record, WHERE), "data.train")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("names", "columns", "format_name"),
    [
        (["question", "answer"], {"instruction": "question", "output": "answer"}, "alpaca"),
        ([" prompt", "Completion"], {"prompt": " prompt", "completion": "Completion"}, "prompt-completion"),
        (["id", "Dialogue"], {"messages": "Dialogue"}, "messages"),
        (["Text", "title"], {"text": "Text"}, "text"),
        (
            ["instruction", "context", "response", "category"],
            {"output": "response", "input": "context"},
            "alpaca",
        ),
        (
            ["id", "system_prompt", "question", "response"],
            {"instruction": "question", "output": "response", "system": "system_prompt"},
            "alpaca",
        ),
        (["dialogue", "system_prompt"], {"messages": "dialogue", "system": "system_prompt"}, "messages"),
        (["input", "output"], None, None),  # alpaca would take the input twice
        (["a", "b", " " * 500 + "text"], None, None),
    ],
)
def test_columns_that_would_fit_are_told(names, columns, format_name):
    record = dict.fromkeys(names, "a")
    with pytest.raises(UserError) as caught:
        resolve_format(DatasetConfig(path="x"), (record, WHERE), "data.train")
    _, _, told = str(caught.value).partition("set data.train.columns")
    if columns is None:
        assert told == ""
        return
    assert YAML(typ="safe").load(told.removeprefix(", such as ")) == columns
    assert resolve_format(DatasetConfig(path="x", columns=columns), (record, WHERE), "data.train") == format_name


def test_lists_in_pythons_own_notation_are_told():
    with pytest.raises(UserError, match=r"JSON text of one \(as json.dumps writes it"):
        to_sample({"messages": "[{'role': 'user', 'content': 'a'}]"}, "messages", {}, WHERE)


def test_every_format_of_the_schema_is_known():
    allowed = DatasetConfig.model_fields["format"].annotation.__args__
    assert set(allowed) == {"auto", *FORMATS}
