"""A look at the first rows of a run's own files, for `dist-qft validate`: no tokenizer, no other file of the model."""

import os
from collections import Counter
from itertools import islice

from dist_qft.config.data_schema import DataConfig, DatasetConfig
from dist_qft.data.files import find_files, read_file
from dist_qft.data.formats import format_for_task, to_sample
from dist_qft.data.holding_out import require_some_left
from dist_qft.data.long_texts import most_characters
from dist_qft.data.records import LocatedRecord, RowError
from dist_qft.data.sources import local_path
from dist_qft.errors import UserError

FIRST_ROWS = 100  # of each data set
_WHOLE = (".json", ".json.gz")  # read whole before the first row is there
_LARGEST_WHOLE = 64 * 2**20


def check_first_rows(data: DataConfig, task: str) -> None:
    """Refuse local data whose first rows do not fit, or that has too few rows for those that are held out.

    Files that are missing are not looked at: a plan may be made on another machine. Neither are data of the Hub, nor
    JSON files that are large and would be read whole.

    Args:
        task: `task.name`, which may tell the format.

    Raises:
        UserError: the format cannot be told, or too few rows are there.
        RowError: a row does not have its format, and `data.on_bad_row` is error.
    """
    counts = {key: _checked(data, dataset, key, task) for key, dataset in data.all_sets().items()}
    trained = [counts[key] for key in data.train_sets()]
    if data.eval_samples and all(count is not None for count in trained):
        require_some_left(sum(count for count in trained if count is not None), data.eval_samples)


def _checked(data: DataConfig, dataset: DatasetConfig, key: str, task: str) -> int | None:
    """Check the first rows of a data set; their number if those are all, else None."""
    records = _first_records(dataset, key, most_characters(data.max_length))
    format_name: str | None = None
    for record, where in records or ():
        try:
            if isinstance(record, RowError):
                raise record
            format_name = format_name or format_for_task(dataset, (record, where), key, task)
            to_sample(record, format_name, dataset.columns, where)
        except RowError:
            if data.on_bad_row == "error":
                raise
    return len(records) if records is not None and len(records) < FIRST_ROWS else None


def _first_records(dataset: DatasetConfig, key: str, longest: int | None) -> list[LocatedRecord] | None:
    """The first records of local files; None where there are none to look at."""
    path = local_path(dataset)
    if path is None:
        return None
    try:
        found = find_files(path, key, dataset.split)
    except UserError:  # told among the plan's warnings
        return None
    if any(file.name.endswith(_WHOLE) and os.path.getsize(file) > _LARGEST_WHOLE for file in found.files):
        return None
    limit = FIRST_ROWS if dataset.limit is None else min(dataset.limit, FIRST_ROWS)
    counts: Counter[str] = Counter()
    records = (record for file in found.files for record in read_file(file, counts, longest))
    return list(islice(records, limit))
