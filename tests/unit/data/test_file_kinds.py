"""File types by their names: separators of tables, compressed files, patterns, and hints for other types."""

import gzip
import json

import pytest

from dist_qft.data import narrow_text
from dist_qft.data.files import find_files
from dist_qft.errors import UserError
from tests.unit.data.test_files import read


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("a.txt", 'put a row {"text": ...} for each text into a .jsonl file'),
        ("a.jsonl.zst", "unpack it first"),
        ("a.parquet.gz", "unpack it first"),
        ("a.xlsx", "save it as .csv"),
    ],
)
def test_a_file_of_another_type_says_what_to_do(tmp_path, name, hint):
    (tmp_path / name).write_bytes(b"x")
    for path in (tmp_path / name, tmp_path, tmp_path / "a*"):
        with pytest.raises(UserError) as caught:
            find_files(path, "data.train")
        assert str(caught.value).endswith(f".parquet, .arrow; {hint}")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (gzip.compress(b"{}", mtime=0), "compressed by gzip; must be named .gz, or unpacked"),
        (b"PK\x03\x04\x14", "a zip archive or a spreadsheet; must be unpacked, or saved as CSV"),
        ("a;b".encode("utf-16"), "UTF-16 text; must be UTF-8, as `iconv -f UTF-16 -t UTF-8` makes it"),
        (b"\xfe\xff\0a", "UTF-16 text; must be UTF-8, as `iconv -f UTF-16 -t UTF-8` makes it"),
    ],
)
def test_a_file_that_is_something_else_than_its_name_says(tmp_path, content, fault):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        find_files(path, "data.train")
    assert str(caught.value) == f"data.train.path: {path} is {fault}"


ROWS = [{"prompt": "a, b", "completion": "é"}, {"prompt": 'say "x"', "completion": "1\n2"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.ndjson", "".join(json.dumps(row) + "\n" for row in ROWS)),
        ("a.tsv", 'prompt\tcompletion\na, b\té\n"say ""x"""\t"1\n2"\n'),
        ("a.csv", 'prompt,completion\n"a, b",é\n"say ""x""","1\n2"\n'),
        ("semicolons.csv", '\ufeffprompt;completion\r\na, b;é\r\n"say ""x""";"1\n2"\r\n'),
        ("tabs.csv", 'prompt\t"completion"\na, b\té\n"say ""x"""\t"1\n2"\n'),
        ("a.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS)),
        ("a.json", json.dumps(ROWS)),
    ],
)
def test_tables_and_compressed_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    packed = tmp_path / "packed" / f"{name}.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(content.encode()))
    for path in (tmp_path / name, packed, packed.parent):
        assert [record for record, _ in read(path)[0]] == ROWS


def test_a_comma_in_a_header_is_a_separator_unless_it_is_quoted(tmp_path):
    (tmp_path / "a.csv").write_text("a;b,c\n1;2,3\n")
    assert [record for record, _ in read(tmp_path / "a.csv")[0]] == [{"a;b": "1;2", "c": "3"}]
    (tmp_path / "a.csv").write_text('"a,b";c\n1;2\n')
    assert [record for record, _ in read(tmp_path / "a.csv")[0]] == [{"a,b": "1", "c": "2"}]
    (tmp_path / "a.csv").write_text("text\n1;2\n")
    assert [record for record, _ in read(tmp_path / "a.csv")[0]] == [{"text": "1;2"}]


def test_blank_lines_before_a_header_are_skipped(tmp_path):
    (tmp_path / "a.csv").write_text("\n\r\nprompt;completion\n1;2\n\n")
    located, counts = read(tmp_path / "a.csv")
    assert located == [({"prompt": "1", "completion": "2"}, f"{tmp_path / 'a.csv'}:4")] and counts["blank_lines"] == 3
    (tmp_path / "a.csv").write_text("\n\n")
    assert read(tmp_path / "a.csv") == ([], {"blank_lines": 2})


def test_a_pattern_is_its_files_by_name(tmp_path):
    for name in ("b1.jsonl", "a1.jsonl", "c.jsonl", "deep/a1.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    assert [record["text"] for record, _ in read(tmp_path / "[ab]?.jsonl")[0]] == ["a1.jsonl", "b1.jsonl"]
    assert [record["text"] for record, _ in read(tmp_path / "**" / "a*.jsonl")[0]] == ["a1.jsonl", "deep/a1.jsonl"]
    with pytest.raises(UserError, match=r"^data.train.split: .* is a pattern and has no splits"):
        find_files(tmp_path / "*.jsonl", "data.train", "test")


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    (tmp_path / "a[1].jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "a1.jsonl").write_text('{"text": "y"}\n')
    assert [record["text"] for record, _ in read(tmp_path / "a[1].jsonl")[0]] == ["x"]


def test_damaged_and_hostile_gzip_files_are_one_line(tmp_path, monkeypatch):
    path, packed = tmp_path / "a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 1000)
    for content in (packed[:-20], packed[:20], packed[:12] + b"\xff\xff" + packed[14:], b"no gzip"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.jsonl\.gz: not a readable gzip file: "):
            read(path)
    monkeypatch.setattr(narrow_text, "PART", 2**10)
    monkeypatch.setattr(narrow_text, "_UNPACKED", 2**12)
    for name, content in (("a.jsonl.gz", b" " * 2**14), ("a.json.gz", b" \n" * 2**13)):
        (tmp_path / name).write_bytes(gzip.compress(content))
        with pytest.raises(UserError, match=r"once unpacked; unpack the file first"):
            read(tmp_path / name)
