"""Readers of local data files: json, jsonl, csv, and the tables of `tables`. Each yields (record, where).

A record is a dict as the file holds it, not yet interpreted. `where` is the place for error messages: `file:line`,
or `file: record N` (from 1) where a file has no lines. Text files are parsed here and not by `datasets`, because
only so can a fault name its file and line. Where one row is at fault, its error is yielded in place of a record, and
the rows behind it are still read. Compressed files are not read.
"""

import itertools
import json
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO

from dist_qft.data.csv_rows import CsvFault, CsvRows
from dist_qft.data.folders import FolderFiles, files_of_folder
from dist_qft.data.records import LocatedRecord, Record, RowError
from dist_qft.data.tables import read_arrow, read_parquet
from dist_qft.errors import UserError
from dist_qft.storage.lfs_pointer import refuse_lfs_pointer

_PART = 2**20  # characters of a long line that are read at a time


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
            refuse_lfs_pointer(file, f"{key}.path")
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
    lines = _text_lines(path)
    for number in itertools.count(1):
        line = next(lines, "")
        if not line:
            return
        if line.isspace():
            counts["blank_lines"] += 1
            continue
        where = f"{path}:{number}"
        try:
            _require_text(line, path, number)
            record: Record | RowError = _require_object(_parse_json(line, path, number), where)
        except RowError as error:
            record = error
        line = ""  # a long line is not kept beside its record
        yield record, where
        record = {}


def _read_json(path: Path, counts: Counter[str]) -> Iterator[LocatedRecord]:
    for line in _checked_lines(path):
        del line  # or the last one, which may be the whole file, would stay in memory
    with _open_text(path) as stream:
        text = stream.read()
    document = _parse_json(text, path, first_line=1)
    del text
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
    reader = CsvRows(_checked_lines(path))
    rows = iter(reader)
    try:
        _, header = next(rows, (1, []))
        if duplicates := [name for name, count in Counter(header).items() if count > 1]:
            raise UserError(f"{path}:1: column {reprlib.repr(duplicates[0])} occurs twice in the header")
        for first_line, row in rows:
            where = f"{path}:{first_line}"  # a quoted field may span lines: name the first
            if not row:
                counts["blank_lines"] += 1
            elif len(row) != len(header):
                yield RowError(f"{where}: {len(row)} columns where the header has {len(header)}"), where
            else:
                yield dict(zip(header, row, strict=True)), where
    except CsvFault as fault:
        raise UserError(f"{path}:{reader.line}: malformed CSV: {fault}") from None


READERS: dict[str, Callable[[Path, Counter[str]], Iterator[LocatedRecord]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}


def _open_text(path: Path) -> TextIO:
    """A file whose lines keep their ends (LF, CR LF or CR), without a byte order mark.

    Bytes that are not UTF-8 become surrogates, which `_require_text` refuses.
    """
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def _text_lines(path: Path) -> Iterator[str]:
    """The lines of a file, with their ends. Long ones are put together from parts, to be in memory twice at most."""
    with _open_text(path) as stream:
        parts: list[str] = []
        part = stream.readline(_PART)
        while part:
            parts.append(part)
            part = stream.readline(_PART)
            if part == "\n" and parts[-1][-1] == "\r":  # one line end, which the limit has split
                parts.append(part)
                part = stream.readline(_PART)
            if not part or parts[-1][-1] in "\r\n":
                parts[:] = ["".join(parts)]
                yield parts.pop()


def _checked_lines(path: Path) -> Iterator[str]:
    def checked(number: int, line: str) -> str:
        _require_text(line, path, number)
        return line

    return map(checked, itertools.count(1), _text_lines(path))


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
