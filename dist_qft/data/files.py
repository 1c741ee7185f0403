"""Readers of local data files: json, jsonl, csv, and the tables of `tables`. Each yields (record, where).

A record is a dict as the file holds it, not yet interpreted. `where` is the place for error messages: `file:line`,
or `file: record N` (from 1) where a file has no lines. Text files are parsed here and not by `datasets`, because
only so can a fault name its file and line. Where one row is at fault, its error is yielded in place of a record, and
the rows behind it are still read. Compressed files are not read.
"""

import csv
import json
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from dist_qft.data.folders import FolderFiles, files_of_folder
from dist_qft.data.records import LocatedRecord, Record, RowError
from dist_qft.data.tables import read_arrow, read_parquet
from dist_qft.errors import UserError


def find_files(path: Path, key: str, split: str = "train") -> FolderFiles:
    """The data files that `path` means: itself, or those of a split in that folder (see `folders`).

    Every file is opened once, so that a missing, unreadable or empty one is refused before any work is done.
    `key` is the config section to blame.
    """
    try:
        found = _list_files(path, key, split)
        for file in found.files:
            with file.open("rb") as stream:
                if not stream.read(1):
                    raise UserError(f"{key}.path: {file} is empty")
    except OSError as error:
        raise UserError(f"{key}.path: cannot read {error.filename or path}: {error.strerror}") from None
    return found


def _list_files(path: Path, key: str, split: str) -> FolderFiles:
    allowed = f"{', '.join(READERS)} (uncompressed)"
    if not path.exists():
        raise UserError(f"{key}.path: no such file or folder: {path}")
    if path.is_dir():
        found = files_of_folder(path, split, tuple(READERS), key)
        if not found.files:
            raise UserError(f"{key}.path: the folder {path} holds no data files; must be {allowed}")
        return found
    if path.suffix not in READERS:
        raise UserError(f"{key}.path: {path} has an unknown file type; must be {allowed}")
    if split != "train":
        raise UserError(f"{key}.split: {path} is one file and has no splits; name the wanted file in {key}.path")
    return FolderFiles([path])


def read_file(path: Path, counts: Counter[str]) -> Iterator[LocatedRecord]:
    """Records of one data file; blank lines are skipped and counted in `counts["blank_lines"]`."""
    return READERS[path.suffix](path, counts)


def _read_jsonl(path: Path, counts: Counter[str]) -> Iterator[LocatedRecord]:
    for number, line in _text_lines(path):
        if not line.strip():
            counts["blank_lines"] += 1
            continue
        where = f"{path}:{number}"
        try:
            _require_text(line, path, number)
            record: Record | RowError = _require_object(_parse_json(line, path, number), where)
        except RowError as error:
            record = error
        yield record, where


def _read_json(path: Path, counts: Counter[str]) -> Iterator[LocatedRecord]:
    document = _parse_json("".join(_checked_lines(path)), path, first_line=1)
    if isinstance(document, dict):
        if "data" not in document:
            raise UserError(f'{path}: an object without "data"; must be an array of objects, or {{"data": [...]}}')
        document = document["data"]
    if not isinstance(document, list):
        raise UserError(f'{path}: {_json_type(document)}; must be an array of objects, or {{"data": [...]}}')
    for number, record in enumerate(document, start=1):
        where = f"{path}: record {number}"
        try:
            yield _require_object(record, where), where
        except RowError as error:
            yield error, where


def _read_csv(path: Path, counts: Counter[str]) -> Iterator[LocatedRecord]:
    csv.field_size_limit(2**31 - 1)  # the module's own limit is 128 KiB
    reader = csv.reader(_checked_lines(path), strict=True)
    try:
        header = next(reader, [])
        if duplicates := [name for name, count in Counter(header).items() if count > 1]:
            raise UserError(f"{path}:1: column {reprlib.repr(duplicates[0])} occurs twice in the header")
        first_line = reader.line_num + 1
        for row in reader:
            where = f"{path}:{first_line}"  # a quoted field may span lines: name the first
            first_line = reader.line_num + 1
            if not row:
                counts["blank_lines"] += 1
                continue
            if len(row) != len(header):
                yield RowError(f"{where}: {len(row)} columns where the header has {len(header)}"), where
                continue
            yield dict(zip(header, row, strict=True)), where
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: malformed CSV: {error}") from None


READERS: dict[str, Callable[[Path, Counter[str]], Iterator[LocatedRecord]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}


def _text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines (from 1, with their line ends: LF, CR LF or CR) of a file, without a byte order mark.

    Bytes that are not UTF-8 become surrogates, which `_require_text` refuses.
    """
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as stream:
        for number, line in enumerate(stream, start=1):
            yield number, line.removeprefix("\ufeff") if number == 1 else line


def _checked_lines(path: Path) -> Iterator[str]:
    for number, line in _text_lines(path):
        _require_text(line, path, number)
        yield line


def _require_text(line: str, path: Path, number: int) -> None:
    """Refuse bytes that are not UTF-8. A NUL is, but in practice it is the mark of a torn file or of UTF-16."""
    if line.isascii() and "\0" not in line:
        return
    bad = line.find("\0")
    if bad < 0:
        try:
            line.encode()
        except UnicodeEncodeError as error:
            bad = error.start
    if bad >= 0:
        column = len(line[:bad].encode("utf-8", "surrogateescape")) + 1
        byte = ord(line[bad]) & 0xFF
        fault = "a NUL byte" if byte == 0 else f"byte 0x{byte:02x} is not UTF-8"
        raise RowError(f"{path}:{number}:{column}: {fault}; must be UTF-8 text")


def _parse_json(text: str, path: Path, first_line: int) -> Any:
    """`text` as strict JSON; a fault names its line in `path`, in which `text` starts at `first_line`."""
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        hint = ""
        if error.msg == "Extra data" and path.suffix == ".json":
            hint = " (one object per line? then name the file .jsonl)"
        line = first_line + error.lineno - 1
        raise RowError(f"{path}:{line}:{error.colno}: malformed JSON: {error.msg}{hint}") from None
    except RecursionError:
        raise RowError(f"{path}:{first_line}: malformed JSON: nested too deeply") from None
    except ValueError as error:
        # From the hooks below, or an integer of more digits than Python converts: these know no position.
        raise RowError(f"{path}:{first_line}: malformed JSON: {error}") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> Record:
    record = dict(pairs)
    if len(record) != len(pairs):
        duplicate = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"duplicate key {reprlib.repr(duplicate)}")
    return record


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _require_object(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise RowError(f"{where}: {_json_type(value)}; must be an object")
    return value


def _json_type(value: Any) -> str:
    names = {list: "an array", dict: "an object", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
