"""Local readers: what they accept, and that every fault names its file and line."""

import datetime
import json
import re
from collections import Counter
from decimal import Decimal

import pyarrow
import pytest
from pyarrow import parquet

from dist_qft.data.files import find_files, read_file
from dist_qft.data.records import RowError
from dist_qft.errors import UserError


def read(path):
    counts = Counter()
    located = [located for file in find_files(path, "data.train").files for located in read_file(file, counts)]
    for record, _ in located:
        if isinstance(record, RowError):
            raise record
    return located, counts


def test_jsonl_skips_blank_lines_and_accepts_bom_crlf_and_no_final_newline(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n  \n{"text": "zw\xc3\xb6lf"}')
    located, counts = read(path)
    assert located == [({"text": "one"}, f"{path}:1"), ({"text": "zw\xf6lf"}, f"{path}:4")]
    assert counts["blank_lines"] == 2


@pytest.mark.parametrize(
    "text", ['[{"text": "a"}, {"text": "b"}]', '{"version": 1, "data": [{"text": "a"}, {"text": "b"}]}']
)
def test_json_array_or_data_object(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    assert read(path)[0] == [({"text": "a"}, f"{path}: record 1"), ({"text": "b"}, f"{path}: record 2")]


def test_csv_names_the_first_line_of_a_record(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\n"two\nlines","a, b"\n\nlast,c\n')
    located, counts = read(path)
    assert located == [
        ({"prompt": "two\nlines", "completion": "a, b"}, f"{path}:2"),
        ({"prompt": "last", "completion": "c"}, f"{path}:5"),
    ]
    assert counts["blank_lines"] == 1


def test_csv_with_long_fields_and_old_line_ends(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"text,n\r" + b"x" * 200_000 + b",1\r" + b'"two\rlines",2\r')
    assert [record for record, _ in read(path)[0]] == [
        {"text": "x" * 200_000, "n": "1"},
        {"text": "two\rlines", "n": "2"},
    ]


def test_parquet_keys_that_other_rows_have(tmp_path):
    path = tmp_path / "a.parquet"
    calls = [{"name": "w", "arguments": {"city": "Paris"}}, {"name": "add", "arguments": {"a": 1, "b": [1, 2]}}]
    parquet.write_table(pyarrow.Table.from_pylist([{"calls": [call], "other": None} for call in calls]), path)
    assert [record["calls"] for record, _ in read(path)[0]] == [[call] for call in calls]


def test_values_of_tables_that_json_does_not_have(tmp_path):
    path, day = tmp_path / "a.parquet", datetime.datetime(2023, 4, 9, 1, 12)
    entry = {"at": day, "on": [day.date()], "cost": Decimal("1.50"), "count": Decimal("2.0"), "blob": b"\xff"}
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": [entry]}]), path)
    expected = {"at": "2023-04-09T01:12:00", "on": ["2023-04-09"], "cost": 1.5, "count": 2, "blob": "/w=="}
    [(record, _)] = read(path)[0]
    assert json.loads(json.dumps(record)) == {"messages": [expected]}


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [{"messages": [{"role": "user", "content": f"\xe9{i}"}]} for i in range(3000)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    located, _ = read(path)
    assert [record for record, _ in located] == rows
    assert located[2999][1] == f"{path}: record 3000"


def test_folder_reads_its_data_files_by_name_and_nothing_else(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"text": "second"}\n')
    (tmp_path / "a.json").write_text('[{"text": "first"}]')
    (tmp_path / "README.md").write_text("no data")
    (tmp_path / ".hidden.jsonl").write_text("no data")
    assert [record["text"] for record, _ in read(tmp_path)[0]] == ["first", "second"]


MALFORMED = [
    ("cut.jsonl", b'{"a": 1}\n{"a": ', ":2:7: malformed JSON: Expecting value"),
    ("quote.jsonl", b"{'a': 1}\n", ":1:2: malformed JSON: Expecting property name enclosed in double quotes"),
    ("comma.jsonl", b'{"a": 1},\n', ":1:9: malformed JSON: Extra data"),
    ("two.jsonl", b'\n\n{"a": 1} {"a": 2}\n', ":3:10: malformed JSON: Extra data"),
    ("array.jsonl", b"{}\n[1, 2]\n", ":2: an array; must be an object"),
    ("string.jsonl", b'"text"\n', ":1: a string; must be an object"),
    ("number.jsonl", b"12\n", ":1: a number; must be an object"),
    ("null.jsonl", b"null\n", ":1: null; must be an object"),
    ("boolean.jsonl", b"true\n", ":1: a boolean; must be an object"),
    ("nan.jsonl", b'{"a": NaN}\n', ":1: malformed JSON: NaN is not JSON"),
    ("infinity.jsonl", b'{"a": -Infinity}\n', ":1: malformed JSON: -Infinity is not JSON"),
    ("duplicate.jsonl", b'{"a": 1, "b": 2, "a": 3}\n', ":1: malformed JSON: duplicate key 'a'"),
    ("nested_duplicate.jsonl", b'{"a": {"b": 2, "b": 3}}\n', ":1: malformed JSON: duplicate key 'b'"),
    ("deep.jsonl", b"{}\n" + b"[" * 200_000, ":2: malformed JSON: nested too deeply"),
    ("digits.jsonl", b'{"a": ' + b"9" * 5000 + b"}\n", ":1: malformed JSON: Exceeds the limit"),
    ("control.jsonl", b'{"a": "x\x01"}\n', ":1:9: malformed JSON: Invalid control character at"),
    ("utf8.jsonl", b'{}\n{"a": "\xff"}\n', ":2:8: byte 0xff is not UTF-8"),
    ("latin1.jsonl", b'{"a": "caf\xe9"}\n', ":1:11: byte 0xe9 is not UTF-8"),
    ("cut_utf8.jsonl", b'{"a": "\xc3', ":1:8: byte 0xc3 is not UTF-8"),
    ("torn.jsonl", b'{"a": 1}\n{"a": \0\0\0', ":2:7: a NUL byte"),
    ("utf16.jsonl", '{"a": 1}'.encode("utf-16-le"), ":1:2: a NUL byte"),
    (
        "rows.jsonl",
        b'[{"a": 1}, {}]',
        ":1: an array; must be an object (a whole array of them? then name the file .json)",
    ),
    (
        "lines.json",
        b'{"a": 1}\n{"a": 2}\n',
        ":2:1: malformed JSON: Extra data (one object per line? then name the file .jsonl)",
    ),
    ("cut.json", b'[{"a": 1},\n {"a": 2}\n', ":3:1: malformed JSON: Expecting ',' delimiter"),
    ("object.json", b'{"a": 1}', ': an object without "data"; must be an array of objects, or {"data": [...]}'),
    ("data_object.json", b'{"data": {"a": 1}}', ': an object; must be an array of objects, or {"data": [...]}'),
    ("number.json", b"7", ': a number; must be an array of objects, or {"data": [...]}'),
    ("entry.json", b'[{"a": 1}, "b"]', ": record 2: a string; must be an object"),
    ("utf8.json", b'[\n{"a": "\xff"}]', ":2:8: byte 0xff is not UTF-8"),
    ("short.csv", b"a,b\n1,2\n1\n", ":3: 1 columns where the header has 2"),
    ("long.csv", b"a,b\n1,2,3\n", ":2: 3 columns where the header has 2"),
    ("quote.csv", b'a,b\n1,"2\n', ":2: malformed CSV: a quoted field does not end"),
    ("open.csv", b'a,b\n1,2\n3,"4\n5,6\n7,8\n', ":3: malformed CSV: a quoted field does not end"),
    ("after_quote.csv", b'a,b\n1,2\n"1"x,2\n', ":3: malformed CSV: ',' expected after '\"'"),
    ("header.csv", b"a,b,a\n1,2,3\n", ":1: column 'a' occurs twice in the header"),
    ("utf8.csv", b"a,b\n1,\xff\n", ":2:3: byte 0xff is not UTF-8"),
    (
        "text.parquet",
        b"no parquet at all",
        ": not a readable parquet file (after record 0): Parquet magic bytes not found",
    ),
]


@pytest.mark.parametrize(("name", "content", "message"), MALFORMED, ids=[name for name, *_ in MALFORMED])
def test_malformed_file_is_named_with_its_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}{message}")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_truncated_parquet_names_the_file(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["a"] * 1000}), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=re.escape(f"{path}: not a readable parquet file (after record 0): ")):
        read(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "data.train.path: no such file or folder: {path}"),
        ("empty.jsonl", b"", "data.train.path: {path} is empty"),
        (
            "pointer.parquet",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
            "data.train.path: {path} is a Git LFS pointer, must be the file; run `git lfs pull` there",
        ),
        ("none-*.jsonl", None, "data.train.path: no file fits the pattern {path}"),
        (
            "a.bin",
            b"x",
            "data.train.path: {path} has an unknown file type; "
            "must be .json, .jsonl, .ndjson, .csv, .tsv (each also as .gz), .parquet, .arrow",
        ),
    ],
)
def test_unusable_path(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        find_files(path, "data.train")
    assert str(caught.value) == message.format(path=path)


def test_name_that_no_file_system_takes(tmp_path):
    with pytest.raises(UserError, match=r"^data.train.path: cannot read .*x\.jsonl: File name too long$"):
        find_files(tmp_path / f"{'x' * 300}.jsonl", "data.train")


def test_a_name_that_occurs_twice_in_a_table(tmp_path):
    """Of two columns, or two fields of a struct, one would be taken in silence."""
    path, texts = tmp_path / "a.parquet", pyarrow.array(["a"])
    parquet.write_table(pyarrow.Table.from_arrays([texts, texts], names=["text", "text"]), path)
    with pytest.raises(UserError, match=r"a.parquet: column 'text' occurs twice"):
        next(read_file(path, Counter()))
    field = pyarrow.field("b", pyarrow.string())
    inner = pyarrow.StructArray.from_arrays([texts, texts], fields=[field, field])
    parquet.write_table(pyarrow.table({"text": texts, "more": inner}), path)
    with pytest.raises(UserError, match=r"not a readable parquet file .*duplicate field names"):
        next(read_file(path, Counter()))


def test_folder_without_data_files(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(
        UserError, match=r"the folder .* holds no data files; must be \.json, \.jsonl, \.ndjson, \.csv, \.tsv"
    ):
        find_files(tmp_path, "data.train")


def test_dangling_link_in_a_folder_is_not_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"data.train.path: cannot read .*b\.jsonl: No such file or directory"):
        find_files(tmp_path, "data.train")


def test_rows_behind_one_that_cannot_be_read(tmp_path):
    contents = {
        "a.jsonl": b'{"text": "1"}\n{"text": \n\xff\n[]\n{"text": "5"}\n',
        "b.csv": b"text\none\ntwo,more\nthree\n",
        "c.json": b'[{"text": "a"}, 3, {"text": "b"}]',
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    kept = {name: [row for row, _ in read_file(tmp_path / name, Counter())] for name in contents}
    assert [isinstance(row, RowError) for row in kept["a.jsonl"]] == [False, True, True, True, False]
    assert [isinstance(row, RowError) for row in kept["b.csv"]] == [False, True, False]
    assert [isinstance(row, RowError) for row in kept["c.json"]] == [False, True, False]
    assert f"{tmp_path / 'a.jsonl'}:3:1: byte 0xff" in str(kept["a.jsonl"][2])
