"""Readers of files that hold tables: parquet, and the Arrow files that `datasets` writes with `save_to_disk`."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_qft.data.records import LocatedRecord, Record
from dist_qft.errors import UserError

_BATCH = 64  # rows turned into Python objects at a time


def read_parquet(path: Path, counts: Counter[str]) -> Iterator[LocatedRecord]:
    """Records of a parquet file. `counts` stays as it is: tables have no blank lines."""
    from pyarrow import parquet  # imported here: most runs read no table, and it costs part of a second

    def batches() -> Iterator[Any]:
        with parquet.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=_BATCH)

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

    number = 0
    try:
        for batch in batches:
            for start in range(0, batch.num_rows, _BATCH):
                for record in batch.slice(start, _BATCH).to_pylist():
                    number += 1
                    yield without_nulls(record), f"{path}: record {number}"
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: not a readable {kind} file (after record {number}): {reason}") from None


def without_nulls(record: Record) -> Record:
    """A table's record without the keys that it fills with nulls inside objects, because other rows have them."""
    return {name: _pruned(value) for name, value in record.items()}


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _pruned(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        return [_pruned(entry) for entry in value]
    return value
