"""The sources of records: local files, the Hub, or the standard library's documentation.

`open_data_source` interprets no record, so that a wrong path is refused before anything heavy starts.
"""

import hashlib
import os
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from dist_qft.config.data_schema import DataConfig, DatasetConfig
from dist_qft.data import stdlib_docs
from dist_qft.data.files import find_files, names_local_data, read_file
from dist_qft.data.records import LocatedRecord
from dist_qft.data.tables import table_records
from dist_qft.errors import UserError
from dist_qft.storage.manifest import sha256_of

STDLIB_DOCS = "stdlib-docs"
_BATCH = 64  # rows of Hub data read at a time


@dataclass(frozen=True)
class Source:
    """An opened data set.

    digest: equal for equal content. Local files count by content, so touching one changes nothing.
    read: yields (record, where) and counts the records that it skipped in the given counter.
    notes: lines for the user, such as which of a folder's files were taken.
    """

    digest: str
    read: Callable[[Counter[str]], Iterator[LocatedRecord]]
    notes: tuple[str, ...] = ()


def open_data_source(dataset: DatasetConfig, key: str, longest: int | None = None) -> Source:
    """The source that `dataset` names. `key` is its config section (`data.train`), for messages.

    longest: characters of a text that are wanted at most, see `files.read_file`.

    UserError: no such file, folder or Hub data set; a file that cannot be read, is empty, or has an unknown type;
    a split or name that the source does not have.
    """
    if dataset.path == STDLIB_DOCS:
        return _open_stdlib_docs(dataset, key)
    path = local_path(dataset)
    return _open_hub(dataset, key) if path is None else _open_files(dataset, path, key, longest)


def require_local_files(dataset: DatasetConfig, key: str) -> None:
    """Refuse files of this machine that are missing or empty, without reading them. Elsewhere nothing is asked."""
    if (path := local_path(dataset)) is not None:
        find_files(path, key, dataset.split)


def missing_data(data: DataConfig) -> list[str]:
    """Lines that say which local data sets of `data` this machine does not have; files are opened and not read."""
    found = []
    for key, dataset in data.all_sets().items():
        try:
            require_local_files(dataset, key)
        except UserError as error:
            found.append(f"{error} (on this machine; a run needs it)")
    return found


def load_records(dataset: DatasetConfig, source: Source, key: str, counts: Counter[str]) -> Iterator[LocatedRecord]:
    """The records of `source`, at most `dataset.limit` of them; UserError if there are none.

    Adds `read` (records) and `blank_lines` (skipped) to `counts`.
    """
    for located in islice(source.read(counts), dataset.limit):
        counts["read"] += 1
        yield located
    if not counts["read"]:
        raise UserError(f"{key}.path: {dataset.path} holds no records ({counts['blank_lines']} blank lines)")


def local_path(dataset: DatasetConfig) -> Path | None:
    """The file or folder of this machine that a data set names, which need not be there; None for all others."""
    if dataset.path == STDLIB_DOCS:
        return None
    path = Path(os.path.expanduser(dataset.path))  # which, unlike Path's own, leaves an unknown user alone
    local = os.path.exists(path) or names_local_data(path) or dataset.path.startswith((".", "/", "~"))
    return path if local else None


def _open_files(dataset: DatasetConfig, path: Path, key: str, longest: int | None) -> Source:
    if dataset.name is not None:
        raise UserError(f"{key}.name: {path} is local and has none; name the wanted file in {key}.path")
    found = find_files(path, key, dataset.split)
    digest = hashlib.sha256()
    for file in found.files:
        digest.update(f"{file.name}\0{sha256_of(file)}\0".encode())

    def read(counts: Counter[str]) -> Iterator[LocatedRecord]:
        for file in found.files:
            yield from read_file(file, counts, longest)

    return Source(digest.hexdigest(), read, tuple(found.notes))


def _open_stdlib_docs(dataset: DatasetConfig, key: str) -> Source:
    if dataset.name is not None:
        raise UserError(f"{key}.name: got {dataset.name!r}, must be unset for {STDLIB_DOCS}")
    if dataset.split not in stdlib_docs.SPLITS:
        allowed = " or ".join(stdlib_docs.SPLITS)
        raise UserError(f"{key}.split: got {dataset.split!r}, must be {allowed} for {STDLIB_DOCS}")

    def read(counts: Counter[str]) -> Iterator[LocatedRecord]:
        for sample in stdlib_docs.load(dataset.split):
            yield sample, f"{STDLIB_DOCS}:{sample['name']}"

    return Source(f"{STDLIB_DOCS} {stdlib_docs.VERSION} of Python {sys.version}", read)


def _open_hub(dataset: DatasetConfig, key: str) -> Source:
    import datasets  # imported here: it costs a second, and only Hub data needs it

    # A RuntimeError refuses data that need their own code, an ImportError those that need another library.
    refusals = (OSError, ValueError, RuntimeError, ImportError, datasets.exceptions.DatasetsError)

    def refuse(error: Exception) -> UserError:
        reason = (
            textwrap.shorten(str(error), 400) or type(error).__name__
        )  # some name the choices on a line of their own
        return UserError(
            f"{key}.path: {dataset.path!r} is not a local file, and loading it from the Hub failed: {reason}"
        )

    try:
        builder = datasets.load_dataset_builder(dataset.path, dataset.name)
    except refusals as error:
        raise refuse(error) from None

    def read(counts: Counter[str]) -> Iterator[LocatedRecord]:
        try:
            builder.download_and_prepare()
        except refusals as error:
            raise refuse(error) from None
        splits = sorted(builder.info.splits)
        if dataset.split not in splits:
            allowed = ", ".join(splits)
            raise UserError(f"{key}.split: got {dataset.split!r}, must be {allowed} for {dataset.path}")
        # As tables, which are read as those of files are: `datasets` itself would decode each image.
        rows = builder.as_dataset(split=dataset.split).with_format("arrow")
        yield from table_records(rows.iter(_BATCH), f"{dataset.path} ({dataset.split})")

    # The builder's hash covers the revision on the Hub and the builder's own settings.
    return Source(f"hub {builder.hash}", read)
