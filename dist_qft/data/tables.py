"""Readers of tables: parquet, the Arrow files that `datasets` writes with `save_to_disk`, and data of the Hub."""

import base64
import datetime
import decimal
import functools
import itertools
import json
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dist_qft.data.records import LocatedRecord, Record, RowError
from dist_qft.errors import UserError

_BATCH = 64  # rows read at a time
_BATCH_BYTES = 2**22  # of rows read at a time, on average
_JSON_TYPE = "arrow.json"  # of values of any kind, kept as JSON text


def read_parquet(path: Path, counts: Counter[str]) -> Iterator[LocatedRecord]:
    """Records of a parquet file. `counts` stays as it is: tables have no blank lines."""
    from pyarrow import parquet  # imported here: most runs read no table, and it costs part of a second

    def batches() -> Iterator[Any]:
        with parquet.ParquetFile(path) as file:
            metadata = file.metadata
            texts = [
                column.path
                for column in (metadata.schema.column(number) for number in range(metadata.num_columns))
                if column.physical_type == "BYTE_ARRAY"
            ]
        # Texts that the file stores once and repeats by number are kept so: whole, few kilobytes may become gigabytes.
        with parquet.ParquetFile(path, read_dictionary=texts, pre_buffer=False) as file:
            for number in range(metadata.num_row_groups):
                group = metadata.row_group(number)
                rows = _BATCH_BYTES * group.num_rows // max(group.total_byte_size, 1)
                yield from file.iter_batches(batch_size=min(max(rows, 1), _BATCH), row_groups=[number])

    yield from _records(path, "parquet", batches())


def read_arrow(path: Path, counts: Counter[str]) -> Iterator[LocatedRecord]:
    """Records of an Arrow file in the stream or the file format. `counts` stays as it is."""
    import pyarrow

    def batches() -> Iterator[Any]:
        with pyarrow.memory_map(str(path)) as file:
            try:
                stream = pyarrow.ipc.open_stream(file)
            except pyarrow.ArrowInvalid:
                reader = pyarrow.ipc.open_file(file)
                yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
                return
            yield from stream

    yield from _records(path, "Arrow", batches())


def _records(path: Path, kind: str, batches: Iterator[Any]) -> Iterator[LocatedRecord]:
    import pyarrow

    def checked() -> Iterator[Any]:
        for batch in batches:
            names = batch.schema.names
            if len(set(names)) < len(names):
                twice = next(name for name, count in Counter(names).items() if count > 1)
                raise UserError(f"{path}: column {reprlib.repr(twice)} occurs twice")
            yield batch

    number = 0
    try:
        for located in table_records(checked(), str(path)):
            yield located
            number += 1
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: not a readable {kind} file (after record {number}): {reason}") from None


def table_records(batches: Iterator[Any], source: str) -> Iterator[LocatedRecord]:
    """The rows of pyarrow tables or batches of `source`.

    They lack the keys that a table fills with nulls inside objects, because other rows have them.
    Times, decimals and bytes inside objects become what JSON has for them: templates are given JSON. Values of the
    type JSON are read, and keep their own nulls. A row whose JSON cannot be read is a RowError in its place.
    """
    numbers = itertools.count(1)
    for batch in batches:
        readers = {field.name: reader for field in batch.schema if (reader := _json_reader(field)) is not None}
        for row in range(batch.num_rows):
            where = f"{source}: record {next(numbers)}"
            record = {name: _pruned(value) for name, value in batch.slice(row, 1).to_pylist()[0].items()}
            yield _with_json(record, readers, where), where


_Reader = Callable[[Any], Any]


def _json_reader(field: Any) -> _Reader | None:
    """The function that reads the JSON text in a column's values; None for a column that has none."""
    # A pyarrow that does not know the type leaves its name in the field's metadata.
    named = (field.metadata or {}).get(b"ARROW:extension:name", b"").decode()
    if _JSON_TYPE in (named, getattr(field.type, "extension_name", "")):
        return lambda value: value if value is None else json.loads(value)
    kind = getattr(field.type, "storage_type", field.type)
    if hasattr(kind, "value_field"):
        inner = _json_reader(kind.value_field)
        return functools.partial(_each, inner) if inner else None
    fields = [kind.field(number) for number in range(kind.num_fields)]
    inside = {each.name: reader for each in fields if (reader := _json_reader(each)) is not None}
    return functools.partial(_by_key, inside) if inside else None


def _each(reader: _Reader, values: Any) -> Any:
    return [reader(value) for value in values] if isinstance(values, list) else values


def _by_key(readers: dict[str, _Reader], value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: readers[key](entry) if key in readers else entry for key, entry in value.items()}


def _with_json(record: Record, readers: dict[str, _Reader], where: str) -> Record | RowError:
    for name, reader in readers.items():
        try:
            record[name] = reader(record[name])
        except (ValueError, RecursionError) as error:
            return RowError(f"{where}: column {reprlib.repr(name)} is of the type JSON, but holds other text: {error}")
    return record


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _pruned(_in_json(entry)) for key, entry in value.items() if entry is not None}
    if isinstance(value, list) and isinstance(next((entry for entry in value if entry is not None), None), dict | list):
        return [_pruned(entry) for entry in value]
    return value


def _in_json(value: Any) -> Any:
    """A value, or each of a list, as JSON has it: a time in ISO 8601, a decimal as a number, bytes in base64."""
    match value:
        case list():
            return [_in_json(entry) for entry in value]
        case None | str() | bool() | int() | float() | dict():
            return value
        case datetime.date() | datetime.time():
            return value.isoformat()
        case decimal.Decimal():
            return int(value) if value == value.to_integral_value() else float(value)
        case bytes():
            return base64.b64encode(value).decode()
    return str(value)
