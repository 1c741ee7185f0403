"""Rows many times longer than `data.max_length`: their tokens, their memory, and those that are refused."""

import csv
import io
import json
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dist_qft.config.data_schema import DataConfig
from dist_qft.data import files, long_texts, narrow_text
from dist_qft.data.csv_rows import CsvFault, CsvRows
from dist_qft.data.prepare import prepare
from dist_qft.data.samples import Text
from dist_qft.data.tokens import SampleEncoder
from dist_qft.errors import UserError
from tests.unit.data.conftest import CORPUS

SIZE = 4_200_000
WORDS = "The quick brown fox jumps. " * (SIZE // 27)
LENGTH = 32
KINDS = ["jsonl", "csv", "csv lines", "json", "parquet", "jsonl wide", "json wide", "csv wide", "jsonl escapes"]


def _trained(model, trainer, pre_tokenizer=None, normalizer=None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def _tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    words = {"vocab_size": 120, "special_tokens": ["<unk>"], "show_progress": False}
    blanks = normalizers.Replace(" ", "▁")
    return {
        "bpe of one word": _trained(models.BPE(unk_token="<unk>"), trainers.BpeTrainer(**words), None, blanks),
        "wordpiece": _trained(
            models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer(**words), pre_tokenizers.Whitespace()
        ),
        "unigram": _trained(
            models.Unigram(), trainers.UnigramTrainer(unk_token="<unk>", **words), pre_tokenizers.Metaspace()
        ),
    }


@pytest.fixture(scope="module")
def kinds(chatml):
    return {"bytes": chatml, **_tokenizers()}


@given(
    words=st.lists(st.sampled_from([*"aeo ", "the ", "fox", "é", "漢", "\n", "  ", "one two "]), min_size=1),
    kind=st.sampled_from(["bytes", "bpe of one word", "wordpiece", "unigram"]),
)
def test_the_beginning_has_the_tokens_of_the_whole(kinds, words, kind):
    tokenizer, text = kinds[kind], "".join(words) * (2000 // len("".join(words)) + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_texts, "_CHARACTERS", 600)
        patch.setattr(long_texts, "_MOST", 4)
        whole = SampleEncoder(tokenizer, len(tokenizer)).encode(Text(text), "x")
        part = SampleEncoder(tokenizer, len(tokenizer), max_length=16).encode(Text(text), "x")
    assert np.array_equal(part.input_ids, whole.input_ids[: len(part.input_ids)])
    assert len(part.input_ids) > 16 or not part.cut


def _write(folder: Path, kind: str) -> Path:
    path = folder / f"rows.{kind.partition(' ')[0]}"
    match kind:
        case "jsonl":
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in (WORDS, "one", WORDS)))
        case "csv":
            path.write_text(f'text\n"{WORDS}"\n')
        case "csv lines":
            path.write_text('text\n"' + ('a ""b"" ' + "c" * 90 + "\n") * (SIZE // 100) + '"\n')
        case "json":
            path.write_text(json.dumps([{"text": WORDS}]))
        case "json wide" | "jsonl wide":  # Python takes four bytes for each character of a text with an emoji
            row = json.dumps({"text": WORDS + "😀"}, ensure_ascii=False)
            path.write_text(f"[{row}]" if kind == "json wide" else row, encoding="utf-8")
        case "jsonl escapes":  # of few characters: each is longer than what it stands for
            path.write_text(json.dumps({"text": WORDS.replace("jumps.", 'j"\n"') + "😀"}) + "\n")
        case "csv wide":
            path.write_text(f'text\n"{WORDS}😀"\n', encoding="utf-8")
        case "parquet":
            parquet.write_table(pyarrow.table({"text": [WORDS, "one"]}), path)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_row_takes_three_times_its_size_at_most(kind, chatml, tmp_path, monkeypatch):
    lengths, call = [], type(chatml).__call__

    def measured(self, text, **settings):
        lengths.append(len(text))
        return call(self, text, **settings)

    monkeypatch.setattr(type(chatml), "__call__", measured)
    monkeypatch.setattr(long_texts, "_CHARACTERS", 2**13)  # of a long text 32 times as many are read at most
    (tmp_path / "small.jsonl").write_text('{"text": "one"}\n')
    _prepared(chatml, tmp_path / "small.jsonl")  # imports what it needs
    path = _write(tmp_path, kind)
    tracemalloc.start()
    try:
        train = _prepared(chatml, path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert train.counts["truncated"] == 1 + (kind == "jsonl")
    assert peak < 3 * SIZE + 2_000_000  # the tokens of the beginning, as Python objects
    assert max(lengths) == 2**13


def _prepared(tokenizer, path: Path, **settings):
    data = DataConfig.model_validate({"train": {"path": str(path)}, "max_length": LENGTH, **settings})
    return prepare(data, tokenizer, 400, path.parent / "cache").train


def test_texts_that_a_table_repeats_are_in_memory_once(tmp_path):
    path, text = tmp_path / "rows.parquet", "x" * 1_000_000
    turns = [{"role": "user", "content": text}]
    parquet.write_table(pyarrow.table({"text": [text] * 40, "messages": [turns] * 40}), path)
    before = pyarrow.total_allocated_bytes()
    for record, _ in files.read_file(path, Counter()):
        assert len(record["text"]) == len(record["messages"][0]["content"]) == 1_000_000
        assert pyarrow.total_allocated_bytes() - before < 20_000_000


def _rows(folder: Path, *rows: dict) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _chat(answer: str) -> dict:
    return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]}


def test_a_conversation_too_long_to_render_is_refused_dropped_or_skipped(chatml, tmp_path):
    path = _rows(tmp_path, _chat("one"), _chat(WORDS[: 2**22 + 1]))
    with pytest.raises(UserError, match=r"rows.jsonl:2: got a conversation of at least 4,194,3\d\d characters, must"):
        _prepared(chatml, path)
    assert _prepared(chatml, path, overlong="drop").counts["dropped_overlong"] == 1
    assert _prepared(chatml, path, on_bad_row="skip", max_bad_rows=0.5).counts["skipped"] == 1


def test_limits_of_a_long_prompt_and_answer(chatml, tmp_path):
    late = _rows(tmp_path, {"prompt": "a", "completion": "b"}, {"prompt": WORDS, "completion": "b"})
    assert _prepared(chatml, late).counts["dropped_targets_cut_off"] == 1
    with pytest.raises(UserError, match=r"rows.jsonl:2: .*max_source_length"):
        _prepared(chatml, late, max_source_length=8)
    with pytest.raises(UserError, match=r"got at least .* tokens, must be at most data.max_length"):
        _prepared(chatml, late, overlong="error")
    early = _rows(tmp_path, {"prompt": "one two three four", "completion": WORDS})
    whole = _prepared(chatml, early, max_source_length=4, max_target_length=8)
    assert whole.counts["shortened"] == 1 and whole.counts["target_tokens"] == 8


def test_a_long_text_that_gives_no_tokens_is_refused(kinds, tmp_path):
    path = _rows(tmp_path, {"text": "one two"}, {"text": " " * 5_000_000})
    with pytest.raises(UserError, match=r"rows.jsonl:2: got at least 5,000,000 characters"):
        _prepared(kinds["wordpiece"], path)


@given(st.text(alphabet='a,"\n\r b', max_size=30))
def test_csv_rows_are_those_of_python(text):
    def lines():
        return iter(io.StringIO(text, newline=""))

    try:
        expected = list(csv.reader(lines(), strict=True))
    except csv.Error:
        with pytest.raises(CsvFault):
            list(CsvRows(lines()))
        return
    assert [row for _, row in CsvRows(lines())] == expected


def _parts_of(characters: int, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(narrow_text, "PART", characters)
    patch.setattr(narrow_text, "_DECODED", characters)
    patch.setattr(files, "PART", characters)


def test_lines_longer_than_a_part(tmp_path, monkeypatch):
    _parts_of(4, monkeypatch)
    path = tmp_path / "rows.jsonl"
    for end in ("\n", "\r\n", "\r"):
        for blanks in range(5):
            path.write_bytes((" " * blanks + '{"text": "abc"}' + end + end + '{"text": "d"}').encode())
            found = [(record["text"], where) for record, where in files.read_file(path, Counter())]
            assert found == [("abc", f"{path}:1"), ("d", f"{path}:3")]


def test_a_document_of_many_rows_takes_three_times_its_size_at_most(tmp_path):
    path = tmp_path / "rows.json"
    rows = [{"text": "The quick brown fox jumps. " * 20 + "😀" * (i % 10 == 0)} for i in range(8000)]
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    tracemalloc.start()
    try:
        for expected, (record, _) in zip(rows, files.read_file(path, Counter()), strict=True):
            assert record == expected
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * path.stat().st_size


_TEXT = st.text(alphabet='aé漢😀\\"\x01\x7f\x80\x85\xa0\u2028 u', max_size=12)
_VALUE = st.recursive(_TEXT | st.integers() | st.none(), lambda each: st.lists(each) | st.dictionaries(_TEXT, each))


@given(rows=st.lists(st.dictionaries(_TEXT, _VALUE, min_size=1), min_size=1, max_size=3), ascii=st.booleans())
def test_records_are_those_of_json_whatever_the_characters(rows, ascii, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    lines = [json.dumps(row, ensure_ascii=ascii) for row in rows]
    (folder / "a.jsonl").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    (folder / "a.json").write_text(f"[{', '.join(lines)}]", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        _parts_of(4, patch)
        for name in ("a.jsonl", "a.json"):
            assert [record for record, _ in files.read_file(folder / name, Counter())] == rows


def test_a_mixture_of_characters_and_escapes(tmp_path, monkeypatch):
    _parts_of(4, monkeypatch)
    (tmp_path / "a.jsonl").write_text(r'{"é": ["\u00e9 \ud83d\ude00 \\u1234 \u001f é😀"]}', encoding="utf-8")
    [(record, _)] = files.read_file(tmp_path / "a.jsonl", Counter())
    assert record == {"é": ["é 😀 \\u1234 \x1f é😀"]}


def test_half_of_a_surrogate_pair_is_read_as_it_is(tmp_path, monkeypatch):
    _parts_of(4, monkeypatch)
    (tmp_path / "a.jsonl").write_text(r'{"a": "\ud83d x \ud83d\ude00 \ude00"}')
    [(record, _)] = files.read_file(tmp_path / "a.jsonl", Counter())
    assert record == {"a": "\ud83d x 😀 \ude00"}


def test_the_beginning_of_a_text_of_many_more_characters_than_wanted_is_enough(tmp_path, monkeypatch):
    _parts_of(64, monkeypatch)
    row = {"long": "é😀 \n" * 1000, "nested": [{"content": "漢" * 1000}], "short": "é" * 90, "plain": "a" * 1000}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    (tmp_path / "a.json").write_text(json.dumps([row], ensure_ascii=False))
    for name in ("a.jsonl", "a.json"):
        [(record, _)] = files.read_file(tmp_path / name, Counter(), 100)
        whole, read = (row["long"], row["nested"][0]["content"]), (record["long"], record["nested"][0]["content"])
        for expected, text in zip(whole, read, strict=True):
            assert expected.startswith(text) and 100 < len(text) <= 164
        assert (record["short"], record["plain"]) == (row["short"], row["plain"])


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ('{"a": "é😀" "b"}', "a.jsonl:1:12: malformed JSON"),  # columns of JSON are in characters
        ('{"é": 1, "é": 2}', "a.jsonl:1: malformed JSON: duplicate key 'é'"),
        (b'{"a": "\xc3\xa9\xf0\x9f\x98\x80 \xff"}', "a.jsonl:1:15: byte 0xff is not UTF-8"),
        (b'{"a": "aaaa\xf0\x9f\x98', "a.jsonl:1:12: byte 0xf0 is not UTF-8"),
        ('{"a": "é😀\0"}', "a.jsonl:1:14: a NUL byte"),
        (b'["\xc3\xa9"]', "a.jsonl:1: an array"),
    ],
)
def test_faults_of_a_long_line_are_told_as_those_of_a_short_one(content, fault, tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    [(short, _)] = files.read_file(path, Counter())
    _parts_of(4, monkeypatch)
    [(long, _)] = files.read_file(path, Counter())
    assert str(long) == str(short) and fault in str(long)
