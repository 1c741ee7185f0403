"""Columns of the type JSON in tables of every kind, with the values that the rows were made of."""

import json
from collections import Counter

import pyarrow
import pytest
from pyarrow import parquet

from dist_qft.config.data_schema import DatasetConfig
from dist_qft.data.files import read_file
from dist_qft.data.records import RowError
from dist_qft.data.sources import _open_hub
from dist_qft.data.tables import table_records

ROWS = [
    {
        "messages": [
            {"role": "user", "content": 'say "hi"\nplease'},
            {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"x": 1, "y": None}}]},
        ],
        "tools": [{"name": "f", "parameters": {"x": {"type": "integer"}, "y": {"enum": ["a"]}}}],
        "note": None,
    },
    {
        "messages": [{"role": "tool", "content": {"a": [1]}}],
        "tools": [{"name": "g", "parameters": {"x": {"type": ["string", "null"]}, "z": {"type": "array"}}}],
        "note": ["12", None],
    },
]


def as_json(*values):
    return [value if value is None else json.dumps(value) for value in values]


def table():
    """`ROWS` as `datasets` keeps rows whose values have no common type: as JSON, in lists and in structs."""
    kind, text = pyarrow.json_(), pyarrow.string()

    def tool(parameters):
        return pyarrow.list_(pyarrow.struct([("name", text), ("parameters", parameters), ("strict", pyarrow.bool_())]))

    tools = [[tool | {"parameters": json.dumps(tool["parameters"])} for tool in row["tools"]] for row in ROWS]
    messages = [as_json(*row["messages"]) for row in ROWS]
    return pyarrow.table(
        {
            "messages": pyarrow.array(messages, pyarrow.list_(text)).cast(pyarrow.list_(kind)),
            "tools": pyarrow.array(tools, tool(text)).cast(tool(kind)),
            "note": pyarrow.array(as_json(*(row["note"] for row in ROWS)), kind),
        }
    )


@pytest.mark.parametrize("name", ["a.parquet", "bare.parquet", "stream.arrow", "file.arrow"])
def test_values_of_the_type_json_are_read_and_keep_their_nulls(tmp_path, name):
    path = tmp_path / name
    if path.suffix == ".parquet":
        parquet.write_table(table(), path, store_schema=name == "a.parquet")
    else:
        new = pyarrow.ipc.new_stream if name == "stream.arrow" else pyarrow.ipc.new_file
        with new(path, table().schema) as writer:
            writer.write_table(table())
    assert [record for record, _ in read_file(path, Counter())] == ROWS


def test_hub_data_are_read_as_files_are(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    folder = tmp_path / "repository"
    folder.mkdir()
    parquet.write_table(table(), folder / "train.parquet")
    located = _open_hub(DatasetConfig(path=str(folder)), "data.train").read(Counter())
    assert list(located) == [(row, f"{folder} (train): record {i}") for i, row in enumerate(ROWS, start=1)]


def test_a_row_whose_json_cannot_be_read_is_at_fault_alone():
    texts = ['{"a": 1}', '{"a": ', None]
    field = pyarrow.field("x", pyarrow.string(), metadata={"ARROW:extension:name": "arrow.json"})
    batch = pyarrow.record_batch([pyarrow.array(texts)], schema=pyarrow.schema([field]))
    (first, _), (second, where), (third, _) = table_records(iter([batch]), "file")
    assert (first, third) == ({"x": {"a": 1}}, {"x": None}) and where == "file: record 2"
    assert isinstance(second, RowError)
    assert str(second).startswith("file: record 2: column 'x' is of the type JSON, but holds other text: Expecting")


def test_tables_with_maps_and_dictionaries():
    kinds = [pyarrow.map_(pyarrow.string(), pyarrow.string()), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())]
    batch = pyarrow.record_batch([pyarrow.array([[("k", "v")]], kinds[0]), pyarrow.array(["a"], kinds[1])], ["m", "d"])
    assert list(table_records(iter([batch]), "file")) == [({"m": [("k", "v")], "d": "a"}, "file: record 1")]
