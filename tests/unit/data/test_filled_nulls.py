"""Nulls of tables: in tools and calls those that a table filled in go, and those that a schema knows stay."""

import json
from collections import Counter

import pytest

from dist_qft.data.files import read_file
from dist_qft.data.filled_nulls import as_schema
from dist_qft.data.formats import to_sample
from tests.support.conversations import WHERE, assistant, call, user


def tool(name, **properties):
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


def arguments(given, tools):
    row = {"messages": [user("q"), assistant(None, tool_calls=[call("f", **given)])], "tools": tools}
    (made,) = to_sample(row, "messages", {}, WHERE).messages[1]["tool_calls"]
    return made["function"]["arguments"]


INNER = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    "properties, given, kept",
    [
        ({"x": {"type": "integer"}, "y": None}, {"x": 1, "y": None}, {"x": 1}),
        ({"x": {"type": ["integer", "null"]}}, {"x": None, "y": None}, {"x": None}),
        ({"x": INNER}, {"x": {"a": None, "b": None}}, {"x": {"a": None}}),
        ({"x": {"type": "array", "items": INNER}}, {"x": [{"a": 1, "b": None}, None]}, {"x": [{"a": 1}, None]}),
        ({"x": INNER | {"additionalProperties": True}}, {"x": {"b": None}}, {"x": {"b": None}}),
        ({}, {"x": None}, {}),
    ],
)
def test_a_null_argument_stays_if_the_schema_knows_it(properties, given, kept):
    assert arguments(given, [tool("g", z=None), tool("f", **properties)]) == kept


@pytest.mark.parametrize("tools", [None, [tool("g")], [{"name": "f"}], [{"name": "f", "parameters": {"x": {}}}]])
def test_without_a_schema_arguments_stay_as_they_are(tools):
    assert arguments({"x": 1, "y": None}, tools) == {"x": 1, "y": None}


def test_nulls_that_are_values_of_a_schema_stay():
    schema = {
        "default": None,
        "enum": ["a", None],
        "title": None,
        "properties": {"default": None, "enum": {"const": None}},
    }
    kept = {"default": None, "enum": ["a", None], "properties": {"enum": {"const": None}}}
    assert as_schema({"parameters": schema, "strict": None}) == {"parameters": kept}
    assert as_schema({"default": {"a": None}, "examples": [{"a": None}]}) == {
        "default": {"a": None},
        "examples": [{"a": None}],
    }


def test_what_datasets_writes_as_json_is_what_it_was_made_of(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [
        {
            "messages": [user("q"), assistant("", tool_calls=[call(name, **{key: 1})])],
            "tools": [tool(name, **{key: text})],
        }
        for name, key, text in (("f", "x", {"type": "integer"}), ("g", "y", {"type": "integer", "title": "Y"}))
    ]
    path = tmp_path / "a.jsonl"
    datasets.Dataset.from_list(rows).to_json(path)
    assert '"y":null' in path.read_text()
    located = list(read_file(path, Counter()))
    made = [to_sample(record, "messages", {}, where) for record, where in located]
    assert made == [to_sample(row, "messages", {}, WHERE) for row in json.loads(json.dumps(rows))]
