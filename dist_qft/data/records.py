"""Records: rows of a data file as the file holds them, each with the place where it was read."""

from typing import Any

from dist_qft.errors import UserError

Record = dict[str, Any]


class RowError(UserError):
    """One row of the data cannot be used. `data.on_bad_row: skip` leaves such rows out; other errors end the run."""


# The place is `file:line`, or `file: record N` (from 1) where a file has no lines. A row that cannot be read is there,
# too, as its error, so that the rows behind it can be.
LocatedRecord = tuple[Record | RowError, str]
