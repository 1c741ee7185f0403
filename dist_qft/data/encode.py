"""Encode a data set's records as token sequences, and count the records that are kept, cut and dropped."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from dist_qft.config.data_schema import DataConfig, DatasetConfig
from dist_qft.data.answers import encode_answers
from dist_qft.data.columns import UnusedColumns, require_columns
from dist_qft.data.formats import format_for_task, to_sample
from dist_qft.data.lengths import Lengths
from dist_qft.data.records import LocatedRecord, RowError
from dist_qft.data.sources import Source, load_records
from dist_qft.data.tokens import Remarks, SampleEncoder, TokenSequence
from dist_qft.errors import UserError

_NAMED = 10  # bad rows that are named


@dataclass(frozen=True)
class Encoded:
    """The kept samples of one data set, counts of the others by reason, and lines for the user."""

    sequences: list[TokenSequence]
    counts: dict[str, int]
    notes: list[str]


@dataclass
class BadRows:
    """Rows that cannot be used. The first ends the run, or they are left out, counted and named."""

    data: DataConfig
    key: str
    counts: Counter[str]
    first: list[str] = field(default_factory=list)

    def take(self, error: RowError) -> None:
        if self.data.on_bad_row == "error":
            raise error
        self.counts["skipped"] += 1
        if len(self.first) < _NAMED:
            self.first.append(str(error))

    def notes(self) -> list[str]:
        """The rows that were left out. UserError if they are too many."""
        skipped, read = self.counts["skipped"], self.counts["read"]
        if not skipped:
            return []
        lines = "".join(f"\n  {line}" for line in self.first)
        told = f"{skipped:,} of {read:,} rows cannot be used, the first of them:{lines}"
        if skipped > self.data.max_bad_rows * read:
            raise UserError(
                f"{self.key}: {told}\nmust be at most {self.data.max_bad_rows:.3g} of them (data.max_bad_rows)"
            )
        return [f"{self.key}: {told}"]


def encode_records(
    data: DataConfig, dataset: DatasetConfig, source: Source, encoder: SampleEncoder, key: str
) -> Encoded:
    """Token sequences of the data set that config section `key` names, at most `data.max_length` tokens each.

    Raises:
        UserError: nothing is left to train on, too many rows cannot be used, or all rows have the same fault.
        RowError: a row cannot be used, and `data.on_bad_row` is error.
    """
    counts: Counter[str] = Counter(read=0, blank_lines=0, truncated=0)
    bad = BadRows(data, key, counts)
    unused = UnusedColumns(dataset)
    encoder.remarks = Remarks()
    require_columns(dataset, source, key)
    sequences = list(_kept(data, dataset, load_records(dataset, source, key, counts), encoder, key, bad, unused))
    notes = [*source.notes, *unused.notes(key), *bad.notes()]
    if not sequences:
        reasons = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()) if count)
        raise UserError(f"{key}: no sample of {dataset.path} has a token to train on ({reasons})")
    for remark, count in encoder.remarks.counts.items():
        notes.append(f"{key}: {remark} ({count:,} of {counts['read']:,} rows, first {encoder.remarks.first[remark]})")
    return Encoded(sequences, {**counts, "kept": len(sequences)}, notes)


def _kept(
    data: DataConfig,
    dataset: DatasetConfig,
    records: Iterator[LocatedRecord],
    encoder: SampleEncoder,
    key: str,
    bad: BadRows,
    unused: UnusedColumns,
) -> Iterator[TokenSequence]:
    limits = Lengths(
        data.max_length,
        data.overlong,
        data.max_source_length,
        data.max_target_length,
        encoder.tokenizer.bos_token_id,
    )
    format_name: str | None = None
    for record, where in records:
        try:
            if isinstance(record, RowError):
                raise record
            if format_name is None:  # the first record that can be read tells the format
                format_name = format_for_task(dataset, (record, where), key, encoder.task.name)
            unused.add(record, format_name)
            sample = to_sample(record, format_name, dataset.columns, where)
            kept = encode_answers(sample, encoder, limits, where, bad.counts)
        except RowError as error:
            bad.take(error)
            continue
        yield from kept


def dropped_line(key: str, counts: Mapping[str, int]) -> str | None:
    """One line on rows that were dropped, cut or skipped; None if none were. `counts` are a `TokenDataset`'s."""
    told = {
        "dropped_overlong": "dropped, longer than data.max_length",
        "dropped_no_targets": "dropped, without a token to train on",
        "dropped_targets_cut_off": "dropped, without a token to train on in the first data.max_length tokens",
        "dropped_same_answers": "dropped, whose two answers are the same tokens",
        "skipped": "skipped, cannot be used",
        "truncated": "cut to data.max_length",
        "shortened": "cut to data.max_source_length or data.max_target_length",
        "blank_lines": "blank lines",
    }
    parts = [f"{counts[name]:,} {words}" for name, words in told.items() if counts.get(name)]
    return f"{key}: of {counts.get('read', 0):,} rows {'; '.join(parts)}" if parts else None
