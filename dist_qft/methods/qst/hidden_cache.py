"""The base's hidden states of every training row, on disk. Nothing flows back through a frozen base: they never change.

Two files that all ranks map into memory and share, so their folder must be on a disk that all of them see:

    states.bin   for each row its layer states (N + 1, tokens, d) and last states (tokens, D), in the compute dtype;
                 with a pooling downsample d / r instead of d
    index.bin    for each row 0, or 1 + the CRC-32 of its bytes, written after them

A row is checked before each use: by its CRC-32 before the first use in this process, later by a sum of its words, which
is several times faster and sees every single flipped bit. A row that is damaged counts as absent: it is computed again.

A row's place follows from the lengths of the rows before it. `cache.json` names the base, data and layout of the
states; a cache of anything else is discarded. Space is reserved at the start, for a full disk would otherwise end a run
that writes through a memory map without a word.
"""

import json
import os
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_qft.errors import SetupError
from dist_qft.methods.qst.network import BaseStates
from dist_qft.storage.lock import locked

_VERSION = 1
_KEY, _STATES, _INDEX = "cache.json", "states.bin", "index.bin"
_FOLDER = "hidden_cache"
_LOCK_SECONDS = 600  # that a rank waits for another one to make the empty files


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


class HiddenCache:
    """The states of rows 0, 1, ... of a data set. A rank writes the rows it computes and reads any.

    Args:
        lengths: (rows,) tokens of each row.
        base, data: fingerprint of the base and digest of the data that the states come from.

    Raises:
        SetupError: there is no room for it, or another process holds its lock for too long.
    """

    def __init__(self, folder: Path, layout: CacheLayout, lengths: np.ndarray, *, base: str, data: str) -> None:
        self.layout = layout
        self._offsets = np.concatenate([[0], np.cumsum(lengths)]) * layout.per_token
        key = {"version": _VERSION, "base": base, "data": data, **asdict(layout), "dtype": str(layout.dtype)}
        sizes = {_STATES: layout.bytes_of(lengths), _INDEX: 8 * len(lengths)}
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "cache.owner", f"method.cache: '{folder}'", _LOCK_SECONDS):
            if _read_key(folder) != key:
                _create(folder, key, sizes)
        self._states = _mapped(folder / _STATES, sizes[_STATES], layout.dtype)
        self._index = _mapped(folder / _INDEX, sizes[_INDEX], torch.int64)
        self._sums: dict[int, int] = {}  # of the rows whose checksum was right in this process

    @property
    def filled(self) -> int:
        """Rows that are there, torn ones included."""
        return int((self._index != 0).sum())

    def has(self, row: int) -> bool:
        """True if a row is there and whole at this moment."""
        entry = int(self._index[row])
        if entry == 0:
            return False
        values = self._row(row)
        words = _word_sum(values)
        # With another sum it may still be right: another rank may have written it anew.
        if self._sums.get(row) != words and entry != _checksum(values):
            return False
        self._sums[row] = words
        return True

    def write(self, row_ids: Sequence[int], states: BaseStates) -> None:
        """Store the rows of a micro-batch (its first ones; the rest only fill it up). Rows that are whole stay."""
        for place, row in enumerate(row_ids):
            if self.has(row):
                continue
            layers, last = self._views(row)
            tokens = last.shape[0]
            for own, given in zip(layers, states.layers, strict=True):
                own.copy_(given[place, :tokens])
            last.copy_(states.last[place, :tokens])
            values = self._row(row)
            self._index[row], self._sums[row] = _checksum(values), _word_sum(values)

    def read(self, row_ids: Sequence[int], shape: tuple[int, int], device: torch.device) -> BaseStates:
        """The states of rows that are there, as a micro-batch (b, L) of them has them; zero where it is padding."""
        layout = self.layout
        layers = torch.zeros(layout.depth, *shape, layout.width, dtype=layout.dtype)
        last = torch.zeros(*shape, layout.out_width, dtype=layout.dtype)
        for place, row in enumerate(row_ids):
            own_layers, own_last = self._views(row)
            tokens = own_last.shape[0]
            layers[:, place, :tokens] = own_layers
            last[place, :tokens] = own_last
        return BaseStates(list(layers.to(device).unbind()), last.to(device))

    def _row(self, row: int) -> Tensor:
        return self._states[self._offsets[row] : self._offsets[row + 1]]

    def _views(self, row: int) -> tuple[Tensor, Tensor]:
        """(N + 1, tokens, width) and (tokens, out_width), views of the file."""
        layout, values = self.layout, self._row(row)
        tokens = values.numel() // layout.per_token
        layers, last = values.split([tokens * layout.depth * layout.width, tokens * layout.out_width])
        return layers.view(layout.depth, tokens, layout.width), last.view(tokens, layout.out_width)


def cache_folder(output_dir: Path) -> Path:
    """The folder in which a run keeps hidden states."""
    return output_dir / _FOLDER


def require_cache_space(folder: Path, needed: int) -> None:
    """Refuse, before anything heavy is done, a cache that does not fit; the space of an older one counts as free.

    Raises:
        SetupError: with the space that it needs and that there is.
    """
    parent = next(path for path in [folder, *folder.parents] if path.exists())
    old = sum((folder / name).stat().st_blocks * 512 for name in (_STATES, _INDEX) if (folder / name).exists())
    free = shutil.disk_usage(parent).free + old
    if needed > free:
        raise _no_room(folder, needed, free)


def _no_room(folder: Path, needed: int, free: int) -> SetupError:
    return SetupError(
        f"method.cache: needs {needed / 2**30:,.1f} GiB in '{folder}', {free / 2**30:,.1f} GiB are free; "
        "method.downsample avgpool or maxpool need about 1/reduction of that; method.cache: none needs no space"
    )


def _read_key(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / _KEY).read_bytes())
    except (OSError, ValueError):
        return None


def _create(folder: Path, key: dict[str, Any], sizes: dict[str, int]) -> None:
    """Empty files of their full size; the key last, which makes them a cache."""
    for name in (_KEY, *sizes):
        (folder / name).unlink(missing_ok=True)
    try:
        for name, size in sizes.items():
            with open(folder / name, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        (folder / _KEY).write_text(json.dumps(key, indent=1) + "\n")
    except OSError:
        for name in sizes:
            (folder / name).unlink(missing_ok=True)
        raise _no_room(folder, sum(sizes.values()), shutil.disk_usage(folder).free) from None


def _mapped(path: Path, size: int, dtype: torch.dtype) -> Tensor:
    return torch.from_file(str(path), shared=True, size=size // dtype.itemsize, dtype=dtype)


def _word_sum(values: Tensor) -> int:
    """Sum of the 64-bit words modulo 2^64; the last bytes that fill no word count one by one."""
    octets = values.view(torch.uint8).numpy()
    whole = len(octets) // 8 * 8
    words = np.frombuffer(octets[:whole].data, dtype=np.uint64)
    return (int(words.sum(dtype=np.uint64)) + sum(octets[whole:].tolist()) * 0x9E3779B97F4A7C15) % 2**64


def _checksum(values: Tensor) -> int:
    return 1 + zlib.crc32(values.view(torch.uint8).numpy().data)
