"""Tokenized samples as flat arrays in one safetensors file; memory-mapped, so the ranks of a node share its pages.

No Python object per sample: millions of samples cost what their tokens cost, 5 bytes each. How samples get here is
`prepare`'s business, in which order they are used `batches`'.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dist_qft.config.data_schema import RowKind
from dist_qft.data.packing import pack
from dist_qft.data.tokens import TokenSequence
from dist_qft.errors import CorruptFileError
from dist_qft.storage.atomic import publishing

FORMAT_VERSION = 4  # of the file and of the way to its tokens: raise it and every cache is rebuilt
_LAYOUT = 1  # of what `digest` covers, in checkpoints too: a run whose rows are still the same goes on
_DTYPES = {"tokens": np.int32, "targets": np.bool_, "row_offsets": np.int64, "segment_starts": np.int64}
_KEYS = {"version", "digest", "pad_id", "packed_length", "report", "notes", "mixture", "kind", "told"}
_COUNTED = ("rows", "tokens", "target_tokens")
_LABELS = "labels"  # the one array that not every data set has


class Row(NamedTuple):
    """tokens: (n,) int32. targets: (n,) bool. segment_starts: (segments,) int64, the first always 0."""

    tokens: np.ndarray
    targets: np.ndarray
    segment_starts: np.ndarray


class Part(NamedTuple):
    """One of several data sets that are mixed: its rows, and its share of the rows that are drawn."""

    rows: int
    weight: float


@dataclass(frozen=True)
class TokenDataset:
    """Rows of one or (packed) several samples; a sample within a row is a *segment*.

    tokens: (total,) int32. targets: (total,) bool, whether a token is predicted from those before it in its segment,
    so False at each segment's start. row_offsets: (rows + 1,) int64, in tokens. segment_starts: (segments,) int64, in
    tokens, ascending. packed_length: tokens of a row in a batch if packed, else None. pad_id: fills the rest of a row.
    counts: made while building (read, kept, dropped_*, truncated, tokens, target_tokens, rows, ...).
    labels: (rows,) float32 of labelled rows, whose last token is their one target, for the label; of rated answers
    1 for those that are wanted and 0 for the others. kind: the form of the rows; a pair's row is the better answer and
    the other one, each with the prompt and as a segment of its own.
    notes: lines for the user about samples that were dropped, cut or changed. mixture: rows and weight of each of
    several data sets, which lie one behind the other; () if rows are used in one order over all.
    """

    tokens: np.ndarray
    targets: np.ndarray
    row_offsets: np.ndarray
    segment_starts: np.ndarray
    pad_id: int
    packed_length: int | None = None
    counts: dict[str, int] = field(default_factory=dict)
    labels: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    mixture: tuple[Part, ...] = ()
    kind: RowKind = "tokens"

    @classmethod
    def from_sequences(
        cls,
        sequences: Sequence[TokenSequence],
        pad_id: int,
        packed_length: int | None,
        counts: dict[str, int],
        kind: RowKind = "tokens",
    ) -> "TokenDataset":
        """One row a sequence, or packed into rows of `packed_length`; completes the counts."""
        lengths = np.array([len(sequence.input_ids) for sequence in sequences], dtype=np.int64)
        rows = [[i] for i in range(len(sequences))] if packed_length is None else pack(lengths.tolist(), packed_length)
        order = [i for row in rows for i in row]
        starts = np.concatenate([[0], np.cumsum(lengths[order])])
        segments_before = np.cumsum([0, *map(len, rows)])
        targets = np.concatenate([sequences[i].targets for i in order])
        segment_starts = _with_second_answers(starts[:-1], [sequences[i].second for i in order])
        targets[segment_starts] = False
        labels = None
        if sequences[0].label is not None:
            labels = np.array([sequences[i].label for i in order], dtype=np.float32)
        if kind == "labels":
            targets[:] = False
            targets[starts[1:] - 1] = True
        laid_out = {"rows": len(rows), "tokens": int(starts[-1]), "target_tokens": int(targets.sum())}
        return cls(
            tokens=np.concatenate([sequences[i].input_ids for i in order]),
            targets=targets,
            row_offsets=starts[segments_before],
            segment_starts=segment_starts,
            pad_id=pad_id,
            packed_length=packed_length,
            counts=counts | laid_out,
            labels=labels,
            kind=kind,
        )

    @classmethod
    def mixed(cls, parts: Sequence["TokenDataset"], weights: Sequence[float], counts: dict[str, int]) -> "TokenDataset":
        """Several data sets one behind the other, to be drawn by their weights; completes the counts."""
        ends = np.cumsum([len(part.tokens) for part in parts])
        starts = [end - len(part.tokens) for end, part in zip(ends, parts, strict=True)]
        row_ends = [part.row_offsets[1:] + start for part, start in zip(parts, starts, strict=True)]
        laid_out = {name: sum(part.counts[name] for part in parts) for name in ("rows", "tokens", "target_tokens")}
        labels = [part.labels for part in parts if part.labels is not None]
        return cls(
            tokens=np.concatenate([part.tokens for part in parts]),
            targets=np.concatenate([part.targets for part in parts]),
            row_offsets=np.concatenate([[0], *row_ends]),
            segment_starts=np.concatenate([part.segment_starts + at for part, at in zip(parts, starts, strict=True)]),
            pad_id=parts[0].pad_id,
            packed_length=parts[0].packed_length,
            counts=counts | laid_out,
            labels=np.concatenate(labels) if labels else None,
            mixture=tuple(Part(len(part), weight) for part, weight in zip(parts, weights, strict=True)),
            kind=parts[0].kind,
        )

    def __len__(self) -> int:
        return len(self.row_offsets) - 1

    def row(self, index: int) -> Row:
        start, end = self.row_offsets[index : index + 2]
        first, last = np.searchsorted(self.segment_starts, [start, end])
        return Row(self.tokens[start:end], self.targets[start:end], self.segment_starts[first:last] - start)

    @property
    def lengths(self) -> np.ndarray:
        """(rows,) int64: tokens of each row, without padding."""
        return np.diff(self.row_offsets)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of all that decides the batches; `counts` and `notes` are not part of it."""
        mixture = f" {[tuple(part) for part in self.mixture]}" if self.mixture else ""
        # The form of rows that older versions had as well is known from the arrays.
        kind = "" if self.kind in ("tokens", "labels") else f" {self.kind}"
        digest = hashlib.sha256(f"{_LAYOUT} {self.pad_id} {self.packed_length}{mixture}{kind}".encode())
        for name, array in self._arrays().items():
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(array.view(np.uint8).data)
        return digest.hexdigest()

    def _arrays(self) -> dict[str, np.ndarray]:
        names = list(_DTYPES) if self.labels is None else [*_DTYPES, _LABELS]
        return {name: np.ascontiguousarray(getattr(self, name)) for name in names}

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all. SetupError if there is no space or the folder is not writable."""
        metadata = {
            "version": FORMAT_VERSION,
            "digest": self.digest,
            "pad_id": self.pad_id,
            "packed_length": self.packed_length,
            "report": self.counts,  # its name in files of every version
            "notes": self.notes,
            "mixture": self.mixture,
            "kind": self.kind,
            "told": _digest_of_told(self.counts, self.notes),
        }
        with publishing(path, overwrite=True) as temporary:
            try:
                save_file(self._arrays(), temporary, metadata={"token_dataset": json.dumps(metadata)})
            except SafetensorError as error:  # what the library makes of a full disk
                raise OSError(str(error)) from None

    @classmethod
    def load(cls, path: Path) -> "TokenDataset":
        """Read a file that `save` wrote; CorruptFileError if it holds anything else."""
        try:
            # Through torch, because safetensors maps a file into memory for torch but copies it for numpy.
            with safe_open(path, framework="pt") as file:
                metadata: dict[str, Any] = json.loads((file.metadata() or {})["token_dataset"])
                names = [*_DTYPES, _LABELS] if _LABELS in file.keys() else list(_DTYPES)  # noqa: SIM118 - no dict
                arrays = {name: file.get_tensor(name).numpy() for name in names}
            dataset = cls(
                **arrays,
                pad_id=metadata["pad_id"],
                packed_length=metadata["packed_length"],
                counts=metadata["report"],
                notes=tuple(metadata.get("notes", ())),  # older files have neither
                mixture=tuple(Part(*part) for part in metadata.get("mixture", ())),
                kind=metadata.get("kind", "labels" if _LABELS in arrays else "tokens"),
            )
            expected = metadata["digest"]
            _require_told(metadata)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CorruptFileError(f"{path}: not a token data file: {error!r}") from None
        if (found := dataset.digest) != expected:
            raise CorruptFileError(f"{path}: SHA-256 of the content is {found}, the file says {expected}")
        return dataset


def _with_second_answers(starts: np.ndarray, seconds: Sequence[int | None]) -> np.ndarray:
    """The beginnings of all segments: of the sequences, and within them of the second answers."""
    inner = [start + second for start, second in zip(starts.tolist(), seconds, strict=True) if second is not None]
    return np.sort(np.concatenate([starts, np.array(inner, dtype=np.int64)])) if inner else starts


def _digest_of_told(counts: dict[str, int], notes: Sequence[str]) -> str:
    """SHA-256 (hex) of what is told about the samples, which does not decide the batches."""
    return hashlib.sha256(json.dumps([counts, list(notes)], sort_keys=True).encode()).hexdigest()


def _require_told(metadata: dict[str, Any]) -> None:
    """ValueError unless counts and notes are those that were saved; earlier versions saved no digest of them."""
    counts, notes = metadata["report"], metadata.get("notes", ())
    if not all(isinstance(counts[name], int) for name in _COUNTED):
        raise ValueError("a count is missing")
    if metadata.keys() - _KEYS or metadata.get("version") != FORMAT_VERSION:
        raise ValueError("other metadata than those of this version")
    told = _digest_of_told(counts, notes)
    if metadata.get("told", told) != told:
        raise ValueError("counts and notes are not those that were saved")
