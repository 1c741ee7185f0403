"""Readers of local data files: json, jsonl, csv, parquet. One function a type, each yielding (record, where).

A record is a dict as the file holds it, not yet interpreted. `where` is the place for error messages: `file:line`,
or `file: record N` (from 1) where a file has no lines. Text files are parsed here and not by `datasets`, because
only so can a fault name its file and line. Compressed files are not read.
"""

import csv
import json
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from dist_qft.data.records import LocatedRecord, Record
from dist_qft.errors import UserError


def find_files(path: Path, key: str) -> list[Path]:
    """The data files that `path` means: itself, or the data files directly in that folder, sorted by name.

    Every file is opened once, so that a missing, unreadable or empty one is refused before any work is done.
    `key` is the config key to blame.
    """
    try:
        files = _list_files(path, key)
        for file in files:
            with file.open("rb") as stream:
                if not stream.read(1):
                    raise UserError(f"{key}: {file} is empty")
    except OSError as error:
        raise UserError(f"{key}: cannot read {error.filename or path}: {error.strerror}") from None
    return files


def _list_files(path: Path, key: str) -> list[Path]:
    allowed = f"{', '.join(READERS)} (uncompressed)"
    if not path.exists():
        raise UserError(f"{key}: no such file or folder: {path}")
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in READERS and not file.name.startswith("."))
        if not files:
            raise UserError(f"{key}: the folder {path} holds no data files; allowed: {allowed}")
        return files
    if path.suffix not in READERS:
        raise UserError(f"{key}: {path} has an unknown file type; allowed: {allowed}")
    return [path]


def read_file(path: Path, counts: Counter[str]) -> Iterator[LocatedRecord]:
    """Records of one data file; blank lines are skipped and counted in `counts["blank_lines"]`."""
    return READERS[path.suffix](path, counts)


def _read_jsonl(path: Path, counts: Counter[str]) -> Iterator[LocatedRecord]:
    for number, line in _text_lines(path):
        if not line.strip():
            counts["blank_lines"] += 1
            continue
        where = f"{path}:{number}"
        yield _require_object(_parse_json(line, path, number), where), where


def _read_json(path: Path, counts: Counter[str]) -> Iterator[LocatedRecord]:
    document = _parse_json("".join(line for _, line in _text_lines(path)), path, first_line=1)
    if isinstance(document, dict):
        if "data" not in document:
            raise UserError(f'{path}: an object without "data"; allowed: an array of objects, or {{"data": [...]}}')
        document = document["data"]
    if not isinstance(document, list):
        raise UserError(f'{path}: {_json_type(document)}; allowed: an array of objects, or {{"data": [...]}}')
    for number, record in enumerate(document, start=1):
        where = f"{path}: record {number}"
        yield _require_object(record, where), where


def _read_csv(path: Path, counts: Counter[str]) -> Iterator[LocatedRecord]:
    csv.field_size_limit(2**31 - 1)  # the module's own limit is 128 KiB
    reader = csv.reader((line for _, line in _text_lines(path)), strict=True)
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
                raise UserError(f"{where}: {len(row)} columns where the header has {len(header)}")
            yield dict(zip(header, row, strict=True)), where
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: malformed CSV: {error}") from None


def _read_parquet(path: Path, counts: Counter[str]) -> Iterator[LocatedRecord]:
    import pyarrow  # imported here: most runs read no parquet, and it costs a noticeable part of a second
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                for record in batch.to_pylist():
                    number += 1
                    yield without_nulls(record), f"{path}: record {number}"
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: not a readable parquet file (after record {number}): {reason}") from None


def without_nulls(record: Record) -> Record:
    """A table's record without the keys that it fills with nulls inside objects, because other rows have them."""
    return {name: _pruned(value) for name, value in record.items()}


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _pruned(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        return [_pruned(entry) for entry in value]
    return value


READERS: dict[str, Callable[[Path, Counter[str]], Iterator[LocatedRecord]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines (from 1, with their line ends: LF, CR LF or CR) of a UTF-8 file, without a byte order mark."""
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as stream:
        for number, line in enumerate(stream, start=1):
            if number == 1:
                line = line.removeprefix("\ufeff")
            if not line.isascii() or "\0" in line:
                _require_text(line, path, number)
            yield number, line


def _require_text(line: str, path: Path, number: int) -> None:
    """Refuse bytes that are not UTF-8. A NUL is, but in practice it is the mark of a torn file or of UTF-16."""
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
        raise UserError(f"{path}:{number}:{column}: {fault}; must be UTF-8 text")


def _parse_json(text: str, path: Path, first_line: int) -> Any:
    """`text` as strict JSON; a fault names its line in `path`, in which `text` starts at `first_line`."""
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        hint = ""
        if error.msg == "Extra data" and path.suffix == ".json":
            hint = " (one object per line? then name the file .jsonl)"
        line = first_line + error.lineno - 1
        raise UserError(f"{path}:{line}:{error.colno}: malformed JSON: {error.msg}{hint}") from None
    except RecursionError:
        raise UserError(f"{path}:{first_line}: malformed JSON: nested too deeply") from None
    except ValueError as error:
        # From the hooks below, or an integer of more digits than Python converts: these know no position.
        raise UserError(f"{path}:{first_line}: malformed JSON: {error}") from None


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
        raise UserError(f"{where}: {_json_type(value)}; allowed: an object")
    return value


def _json_type(value: Any) -> str:
    names = {list: "an array", dict: "an object", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
