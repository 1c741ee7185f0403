"""Readers of local data files: json, jsonl, csv, tsv, and the tables of `tables`. Each yields (record, where).

A record is a dict as the file holds it, not yet interpreted. `where` is the place for error messages: `file:line`,
or `file: record N` (from 1) where a file has no lines. Text files are parsed here and not by `datasets`, because
only so can a fault name its file and line. Where one row is at fault, its error is yielded in place of a record, and
the rows behind it are still read. Text files may be compressed by gzip.
"""

import glob
import gzip
import itertools
import json
import re
import reprlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from dist_qft.data.csv_rows import CsvFault, CsvRows
from dist_qft.data.folders import FolderFiles, files_of_folder, kind_of, several_kinds
from dist_qft.data.narrow_text import (
    PART,
    narrow_lines,
    open_narrow,
    require_text,
    require_unpackable,
    widen,
    widened,
    with_narrow_escapes,
)
from dist_qft.data.records import LocatedRecord, Record, RowError
from dist_qft.data.tables import read_arrow, read_parquet
from dist_qft.errors import UserError
from dist_qft.storage.lfs_pointer import refuse_lfs_pointer


def names_local_data(path: Path) -> bool:
    """True for a name that is one of data files, and of no data set of the Hub."""
    return kind_of(path) in _KINDS or path.suffix in _HINTS or glob.has_magic(str(path))


def find_files(path: Path, key: str, split: str = "train") -> FolderFiles:
    """The data files that `path` means: itself, those of a split in that folder (see `folders`), or of a pattern.

    Every file is opened once, so that a missing, unreadable or empty one is refused before any work is done.
    `key` is the config section to blame.
    """
    try:
        found = _list_files(path, key, split)
        for file in found.files:
            with file.open("rb") as stream:
                beginning = stream.read(4)
            if not beginning:
                raise UserError(f"{key}.path: {file} is empty")
            if kind_of(file) in _TEXTS:
                for mark, fault in _NO_TEXTS.items():
                    if beginning.startswith(mark):
                        raise UserError(f"{key}.path: {file} is {fault}")
            refuse_lfs_pointer(file, f"{key}.path")
    except OSError as error:
        raise UserError(f"{key}.path: cannot read {error.filename or path}: {error.strerror}") from None
    return found


def _list_files(path: Path, key: str, split: str) -> FolderFiles:
    if path.is_dir():
        found = files_of_folder(path, split, (_PLAIN, _KINDS), key)
        if not found.files:
            hints = sorted({_HINTS[file.suffix] for file in path.iterdir() if file.suffix in _HINTS})
            raise UserError(
                f"{key}.path: the folder {path} holds no data files; must be {'; '.join([_ALLOWED, *hints])}"
            )
        return found
    if path.exists():
        files = [path]
    else:
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        if not files:
            kind = "file fits the pattern" if glob.has_magic(str(path)) else "such file or folder:"
            raise UserError(f"{key}.path: no {kind} {path}")
    for file in files:
        if kind_of(file) not in _KINDS:
            hint = f"; {_HINTS[file.suffix]}" if file.suffix in _HINTS else ""
            raise UserError(f"{key}.path: {file} has an unknown file type; must be {_ALLOWED}{hint}")
    if kinds := several_kinds(files):
        raise UserError(
            f"{key}.path: the pattern {path} fits files of several types ({kinds}), which may hold the same rows; "
            "must fit those of one"
        )
    if split != "train":
        named, wanted = ("one file", "file") if files == [path] else ("a pattern", "files")
        raise UserError(f"{key}.split: {path} is {named} and has no splits; name the wanted {wanted} in {key}.path")
    return FolderFiles(files)


def read_file(path: Path, counts: Counter[str], longest: int | None = None) -> Iterator[LocatedRecord]:
    """Records of one data file; blank lines are skipped and counted in `counts["blank_lines"]`.

    Of a text of many more than `longest` characters that are not all ASCII, the beginning is enough, if more than that.
    """
    kind = kind_of(path)
    try:
        yield from _TABLES[kind](path, counts) if kind in _TABLES else _READERS[kind](path, counts, longest)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: not a readable gzip file: {error}") from None


def _read_jsonl(path: Path, counts: Counter[str], longest: int | None) -> Iterator[LocatedRecord]:
    lines = narrow_lines(path)
    for number in itertools.count(1):
        line = next(lines, "")
        if not line:
            return
        where = f"{path}:{number}"
        try:
            require_text(line, path, number)
            if "{" not in line and widened(line).isspace():
                counts["blank_lines"] += 1
                continue
            line = with_narrow_escapes(line)
            value, is_narrow = _parse_json(line, path, number)
            line = ""  # a long line is not kept beside its record
            record: Record | RowError = _as_record(value, is_narrow, where, longest)
        except RowError as error:
            record = error
        line, value = "", None
        yield record, where
        record = {}


def _read_json(path: Path, counts: Counter[str], longest: int | None) -> Iterator[LocatedRecord]:
    size = 0
    for line in _checked_lines(path):
        size += len(line)
        require_unpackable(path, size)
        del line  # or the last one, which may be the whole file, would stay in memory
    with open_narrow(path) as stream:
        text = with_narrow_escapes(stream.read())
    document, is_narrow = _parse_json(text, path, first_line=1)
    del text
    if isinstance(document, dict):
        if "data" not in document:
            raise UserError(f'{path}: an object without "data"; must be an array of objects, or {{"data": [...]}}')
        document = document["data"]
    if not isinstance(document, list):
        raise UserError(f'{path}: {_json_type(document)}; must be an array of objects, or {{"data": [...]}}')
    for index in range(len(document)):
        where = f"{path}: record {index + 1}"
        value, document[index] = document[index], None  # a row that was read goes before the next becomes wide
        try:
            yield _as_record(value, is_narrow, where, longest), where
        except RowError as error:
            yield error, where


def _read_csv(path: Path, counts: Counter[str], longest: int | None) -> Iterator[LocatedRecord]:
    lines = _checked_lines(path)  # narrow, as the header and the fields are
    first = [next(lines, "")]
    while first[-1] and not first[-1].strip("\r\n"):
        first.append(next(lines, ""))
    reader = CsvRows(itertools.chain(filter(None, first), lines), _separator(first[-1], path))
    rows = iter(reader)
    try:
        header = next((row for _, row in rows if row), [])
        counts["blank_lines"] += len(first) - 1
        widen(header)
        if duplicates := [name for name, count in Counter(header).items() if count > 1]:
            raise UserError(f"{path}:1: column {reprlib.repr(duplicates[0])} occurs twice in the header")
        for first_line, row in rows:
            where = f"{path}:{first_line}"  # a quoted field may span lines: name the first
            if not row:
                counts["blank_lines"] += 1
            elif len(row) != len(header):
                yield RowError(f"{where}: {len(row)} columns where the header has {len(header)}"), where
            else:
                widen(row, longest)
                yield dict(zip(header, row, strict=True)), where
    except CsvFault as fault:
        raise UserError(f"{path}:{reader.line}: malformed CSV: {fault}") from None


def _separator(header: str, path: Path) -> str:
    """The separator of a table in text: of a header without commas a semicolon, as spreadsheets write it, or a tab."""
    if kind_of(path).startswith(".tsv"):
        return "\t"
    outside = re.sub(r'"[^"]*"', "", header)
    return next((each for each in ",;\t" if each in outside), ",")


_TextReader = Callable[[Path, Counter[str], int | None], Iterator[LocatedRecord]]
_TEXTS: dict[str, _TextReader] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_csv,
}
_READERS = {**_TEXTS, **{f"{kind}.gz": reader for kind, reader in _TEXTS.items()}}
_TABLES = {".parquet": read_parquet, ".arrow": read_arrow}
_KINDS = (*_READERS, *_TABLES)
# The types that a folder is searched for first: it may hold others that are no data, or the same data once more.
_PLAIN = (".json", ".jsonl", ".csv", *_TABLES)
_ALLOWED = f"{', '.join(_TEXTS)} (each also as .gz), {', '.join(_TABLES)}"
_NO_TEXTS = {
    b"\x1f\x8b": "compressed by gzip; must be named .gz, or unpacked",
    b"PK\x03\x04": "a zip archive or a spreadsheet; must be unpacked, or saved as CSV",
    b"\xff\xfe": "UTF-16 text; must be UTF-8, as `iconv -f UTF-16 -t UTF-8` makes it",
    b"\xfe\xff": "UTF-16 text; must be UTF-8, as `iconv -f UTF-16 -t UTF-8` makes it",
}
_HINTS = {
    **dict.fromkeys((".txt", ".md"), 'put a row {"text": ...} for each text into a .jsonl file'),
    **dict.fromkeys((".zst", ".xz", ".bz2", ".zip", ".tar", ".tgz", ".7z", ".gz"), "unpack it first"),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "save it as .csv"),
}


def _checked_lines(path: Path) -> Iterator[str]:
    def checked(number: int, line: str) -> str:
        require_text(line, path, number)
        return line

    return map(checked, itertools.count(1), narrow_lines(path))


def _parse_json(text: str, path: Path, first_line: int) -> tuple[Any, bool]:
    """The value of a narrow text as strict JSON, and True if its texts are still narrow.

    A fault names its line in `path`, in which `text` starts at `first_line`, and its column, in which an escape counts
    as the character that it stands for if the text is a long one (`with_narrow_escapes`).
    """
    if len(text) > PART:
        try:
            return _loads(text), True
        except (ValueError, RecursionError):
            pass  # told below, with the column in characters
    try:
        return _loads(widened(text)), False
    except json.JSONDecodeError as error:
        hint = ""
        if error.msg == "Extra data" and kind_of(path) in (".json", ".json.gz"):
            hint = " (one object per line? then name the file .jsonl)"
        line = first_line + error.lineno - 1
        raise RowError(f"{path}:{line}:{error.colno}: malformed JSON: {error.msg}{hint}") from None
    except RecursionError:
        raise RowError(f"{path}:{first_line}: malformed JSON: nested too deeply") from None
    except ValueError as error:
        # From the hooks below, or an integer of more digits than Python converts: these know no position.
        raise RowError(f"{path}:{first_line}: malformed JSON: {error}") from None


def _loads(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)


def _unique_keys(pairs: list[tuple[str, Any]]) -> Record:
    record = dict(pairs)
    if len(record) != len(pairs):
        duplicate = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"duplicate key {reprlib.repr(duplicate)}")
    return record


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _as_record(value: Any, is_narrow: bool, where: str, longest: int | None) -> Record:
    if not isinstance(value, dict):
        array = isinstance(value, list) and value and all(isinstance(each, dict) for each in value)
        hint = " (a whole array of them? then name the file .json)" if array else ""
        raise RowError(f"{where}: {_json_type(value)}; must be an object{hint}")
    if is_narrow:
        widen(value, longest)
    return value


def _json_type(value: Any) -> str:
    names = {list: "an array", dict: "an object", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
