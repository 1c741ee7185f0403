"""The columns of a data set: those that `columns` names must be there, and those that are not read are told."""

import re
from collections import Counter
from dataclasses import dataclass, field

from dist_qft.config.data_schema import DatasetConfig
from dist_qft.data.fields import field_names
from dist_qft.data.formats import FORMATS
from dist_qft.data.records import Record
from dist_qft.data.sources import STDLIB_DOCS, Source, load_records
from dist_qft.errors import UserError

# Columns that tell rows apart, and what pandas calls an index that it saves.
_IDS = re.compile(r"(?:.*[_\s-])?(?:id|idx|index|uuid|guid|hash)|__index_level_\d+__|Unnamed: \d+|", re.IGNORECASE)
_EMPTY: tuple[object, ...] = (None, "", [], {})


def require_columns(dataset: DatasetConfig, source: Source, key: str) -> None:
    """Refuse `columns` that name a column which no row has. Reads rows until each was seen, mostly the first alone.

    Raises:
        UserError: as said, naming the field, the column and those of the first row.
    """
    missing = {column: name for name, column in dataset.columns.items()}
    there = ""
    for record, _ in load_records(dataset, source, key, Counter()) if missing else ():
        if isinstance(record, dict):
            there = there or field_names(record)
            missing = {column: name for column, name in missing.items() if column not in record}
        if not missing:
            return
    if missing and there:
        column, name = next(iter(missing.items()))
        raise UserError(
            f"{key}.columns.{name}: got {column!r}, must be a column of the data; the first row has: {there}"
        )


@dataclass
class UnusedColumns:
    """The columns of a data set's rows that hold anything and are not read, for a note to the user."""

    dataset: DatasetConfig
    found: set[str] = field(default_factory=set)

    def add(self, record: Record, format_name: str) -> None:
        """Take in the columns of one row."""
        required, optional = FORMATS[format_name]
        used = {self.dataset.columns.get(name, name) for name in (*required, *optional)}
        if "tools" in optional:
            used.add("functions")
        unused = record.keys() - used - self.found
        self.found.update(name for name in unused if not any(record[name] == empty for empty in _EMPTY))

    def notes(self, key: str) -> list[str]:
        """One line for the user, or none."""
        told = [name for name in sorted(self.found) if not _IDS.fullmatch(name)]
        if not told or self.dataset.path == STDLIB_DOCS:
            return []
        return [f"{key}: columns not used: {field_names(told)}"]
