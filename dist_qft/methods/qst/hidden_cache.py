"""The base's hidden states of every training row, on disk. Nothing flows back through a frozen base: they never change.

Two files for each rank, to which it alone appends; every rank reads all of them, so their folder must be on a disk that
all ranks see:

    states-R.bin   rows behind one another: layer states (N + 1, tokens, d) and last states (tokens, D) of each, in the
                   compute dtype; with a pooling downsample d / r instead of d
    rows-R.bin     for each of them the row, where it begins in bytes, and 1 + the CRC-32 of its bytes, written after it

No file has two writers, and each is closed after a write and opened for a read. NFS promises then that a machine sees
what another one wrote; pages that are mapped into memory it leaves as they were.

A row is checked before each use: by its CRC-32 before the first use in this process, later by a sum of its words, which
is several times faster and sees every single flipped bit. A row that is damaged counts as absent: it is computed again.

`cache.json` names base, settings, data and layout of the states; a cache of anything else is discarded.
"""

import json
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_qft.errors import SetupError
from dist_qft.methods.qst.network import BaseStates
from dist_qft.storage.lock import locked

_VERSION = 2
_KEY, _STATES, _ROWS = "cache.json", "states-*.bin", "rows-*.bin"
_OLDER = ("states.bin", "index.bin")  # of version 1
_FOLDER = "hidden_cache"
_LOCK_SECONDS = 600  # that a rank waits for another one to begin the cache
_RECORD = np.dtype([("row", "<i8"), ("start", "<i8"), ("checksum", "<i8")])


@dataclass(frozen=True)
class CacheLayout:
    """The values that are stored for each token.

    depth: layer states, N + 1. width, out_width: values of each of them, and of the last states. pool: the pooling
    downsample behind them, or "none".
    """

    depth: int
    width: int
    out_width: int
    pool: str
    dtype: torch.dtype

    @property
    def per_token(self) -> int:
        """Values of one token."""
        return self.depth * self.width + self.out_width

    def bytes_of(self, lengths: np.ndarray) -> int:
        """Size of the states of rows of these lengths."""
        return int(lengths.sum()) * self.per_token * self.dtype.itemsize


@dataclass(frozen=True)
class _Place:
    """The file that has a row, its first byte there, and its checksum."""

    states: Path
    start: int
    checksum: int


class HiddenCache:
    """The states of rows 0, 1, ... of a data set. A rank writes the rows it computes and reads any.

    Args:
        lengths: (rows,) tokens of each row.
        rank: of this process: the files that it writes.
        states_of: name -> digest of what the states come from: base, its settings, data.

    Raises:
        SetupError: the folder cannot be written, or another process holds its lock for too long.
    """

    def __init__(
        self, folder: Path, layout: CacheLayout, lengths: np.ndarray, *, rank: int, states_of: Mapping[str, str]
    ) -> None:
        self.layout = layout
        self._folder, self._lengths = folder, lengths
        self._own, self._own_rows = _of_rank(folder, _STATES, rank), _of_rank(folder, _ROWS, rank)
        key = {"version": _VERSION, **states_of, **asdict(layout), "dtype": str(layout.dtype)}
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "cache.owner", f"method.cache: '{folder}'", _LOCK_SECONDS):
            if _read_key(folder) != key:
                _begin(folder, key)
        self._places: dict[int, _Place] = {}
        self._records_read: dict[Path, int] = {}
        self._sums: dict[int, int] = {}  # of the rows whose checksum was right in this process
        self._look()

    @property
    def filled(self) -> int:
        """Rows that were there when this process last looked, torn ones included."""
        return len(self._places)

    def has(self, row: int) -> bool:
        """True if a row is there and whole at this moment, whichever rank wrote it."""
        if self._whole(row):
            return True
        self._look()
        return self._whole(row)

    def write(self, row_ids: Sequence[int], states: BaseStates) -> None:
        """Store the rows of a micro-batch (its first ones; the rest only fill it up). Rows that are whole stay.

        Raises:
            SetupError: the disk is full.
        """
        places = [(place, row) for place, row in enumerate(row_ids) if not self._whole(row)]
        if not places:
            return
        rows = [self._joined(states, place, row) for place, row in places]
        try:
            with open(self._own, "ab") as file:
                start = file.seek(0, 2)
                for values in rows:
                    file.write(_octets(values).data)
            records = []
            for (_, row), values in zip(places, rows, strict=True):
                self._places[row] = known = _Place(self._own, start, _checksum(values))
                self._sums[row] = _word_sum(values)
                records.append((row, known.start, known.checksum))
                start += values.nbytes
            with open(self._own_rows, "ab") as file:
                file.write(bytes(-file.seek(0, 2) % _RECORD.itemsize))  # a record that an end cut off stays apart
                file.write(np.array(records, _RECORD).tobytes())
        except OSError as error:
            needed = f"needs {self.layout.bytes_of(self._lengths) / 2**30:,.1f} GiB for {len(self._lengths):,} rows"
            raise SetupError(
                f"method.cache: cannot write '{self._own}': {error.strerror}; the cache {needed}, "
                "method.cache: none needs no space"
            ) from error

    def read(self, row_ids: Sequence[int], shape: tuple[int, int], device: torch.device) -> BaseStates:
        """The states of rows that are there, as a micro-batch (b, L) of them has them; zero where it is padding."""
        layout = self.layout
        layers = torch.zeros(layout.depth, *shape, layout.width, dtype=layout.dtype)
        last = torch.zeros(*shape, layout.out_width, dtype=layout.dtype)
        for place, row in enumerate(row_ids):
            values, tokens = self._stored(row), int(self._lengths[row])
            if values is None:
                raise SetupError(f"method.cache: row {row} is gone from '{self._folder}' since this step began")
            own_layers, own_last = values.split([tokens * layout.depth * layout.width, tokens * layout.out_width])
            layers[:, place, :tokens] = own_layers.view(layout.depth, tokens, layout.width)
            last[place, :tokens] = own_last.view(tokens, layout.out_width)
        return BaseStates(list(layers.to(device).unbind()), last.to(device))

    def _joined(self, states: BaseStates, place: int, row: int) -> Tensor:
        """The values of a row, which stands at `place` in a micro-batch, as they are stored; on the CPU."""
        tokens = int(self._lengths[row])
        parts = [values[place, :tokens].flatten() for values in (*states.layers, states.last)]
        return torch.cat(parts).to("cpu", self.layout.dtype)

    def _look(self) -> None:
        """Read the records that ranks have written since the last look, this one's of an earlier start included."""
        for path in sorted(self._folder.glob(_ROWS)):
            known = self._records_read.get(path, 0)
            with open(path, "rb") as file:
                file.seek(known * _RECORD.itemsize)
                octets = file.read()
            records = np.frombuffer(octets[: len(octets) // _RECORD.itemsize * _RECORD.itemsize], _RECORD)
            self._records_read[path] = known + len(records)
            states = _of_rank(self._folder, _STATES, path.stem.rpartition("-")[2])
            for row, start, checksum in records.tolist():
                if checksum and 0 <= row < len(self._lengths):
                    self._places[row] = _Place(states, start, checksum)

    def _whole(self, row: int) -> bool:
        """True if a row that this process knows of is undamaged."""
        values = self._stored(row)
        if values is None:
            return False
        words = _word_sum(values)
        # With another sum it may still be right: another rank may have written it anew.
        if self._sums.get(row) != words and self._places[row].checksum != _checksum(values):
            return False
        self._sums[row] = words
        return True

    def _stored(self, row: int) -> Tensor | None:
        """The values of a row as they are on the disk; None if they are not."""
        place = self._places.get(row)
        if place is None:
            return None
        octets = np.empty(self.layout.bytes_of(self._lengths[row : row + 1]), np.uint8)
        try:
            with open(place.states, "rb") as file:
                file.seek(place.start)
                count = file.readinto(octets.data)
        except OSError:
            return None
        return torch.from_numpy(octets).view(self.layout.dtype) if count == len(octets) else None


def cache_folder(output_dir: Path) -> Path:
    """The folder in which a run keeps hidden states."""
    return output_dir / _FOLDER


def require_cache_space(folder: Path, needed: int) -> None:
    """Refuse, before anything heavy is done, a cache that does not fit; the space of an older one counts as free.

    Raises:
        SetupError: with the space that it needs and that there is.
    """
    parent = next(path for path in [folder, *folder.parents] if path.exists())
    free = shutil.disk_usage(parent).free + sum(path.stat().st_blocks * 512 for path in _files(folder))
    if needed > free:
        raise SetupError(
            f"method.cache: needs {needed / 2**30:,.1f} GiB in '{folder}', {free / 2**30:,.1f} GiB are free; "
            "method.downsample avgpool or maxpool need about 1/reduction of that; method.cache: none needs no space"
        )


def _files(folder: Path) -> list[Path]:
    """All files of a cache but its key."""
    return [path for pattern in (_ROWS, _STATES, *_OLDER) for path in folder.glob(pattern)]


def _of_rank(folder: Path, pattern: str, rank: int | str) -> Path:
    return folder / pattern.replace("*", str(rank))


def _read_key(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / _KEY).read_bytes())
    except (OSError, ValueError):
        return None


def _begin(folder: Path, key: dict[str, Any]) -> None:
    """Remove what is there; the key last, which makes the folder a cache."""
    try:
        for path in [folder / _KEY, *_files(folder)]:
            path.unlink(missing_ok=True)
        (folder / _KEY).write_text(json.dumps(key, indent=1) + "\n")
    except OSError as error:
        raise SetupError(f"method.cache: cannot write to '{folder}': {error.strerror}") from error


def _octets(values: Tensor) -> np.ndarray:
    return values.view(torch.uint8).numpy()


def _word_sum(values: Tensor) -> int:
    """Sum of the 64-bit words modulo 2^64; the last bytes that fill no word count one by one."""
    octets = _octets(values)
    whole = len(octets) // 8 * 8
    words = np.frombuffer(octets[:whole].data, dtype=np.uint64)
    return (int(words.sum(dtype=np.uint64)) + sum(octets[whole:].tolist()) * 0x9E3779B97F4A7C15) % 2**64


def _checksum(values: Tensor) -> int:
    return 1 + zlib.crc32(_octets(values).data)
