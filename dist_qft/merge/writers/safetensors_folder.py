"""Safetensors files that are written as their tensors arrive, in any order, a few rows at a time.

The safetensors library writes a file from tensors that are all in memory. A merge has one at a time; as names, shapes
and dtypes are known before, the header can be written first and every tensor goes to its place.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BufferedWriter
from pathlib import Path

import torch
from torch import Tensor

from dist_qft.base_model.sources import DTYPES

SHARD_BYTES = 5_000_000_000  # Hugging Face's own limit
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Entry = tuple[tuple[int, ...], torch.dtype]


@dataclass
class _Shard:
    entries: dict[str, Entry] = field(default_factory=dict)
    bytes: int = 0


class SafetensorsFolder:
    """`<stem>.safetensors`, or `<stem>-0000i-of-0000n.safetensors` with an index, in a folder that exists."""

    def __init__(
        self, folder: Path, stem: str, entries: Mapping[str, Entry], *, shard_bytes: int = SHARD_BYTES
    ) -> None:
        shards = _split(entries, shard_bytes)
        self._files: list[BufferedWriter] = []
        self._places: dict[str, tuple[BufferedWriter, int, int]] = {}  # file, next byte, one past the last
        names: dict[str, str] = {}
        for index, shard in enumerate(shards, 1):
            part = "" if len(shards) == 1 else f"-{index:05}-of-{len(shards):05}"
            path = folder / f"{stem}{part}.safetensors"
            self._start(path, shard)
            names.update(dict.fromkeys(shard.entries, path.name))
        if len(shards) > 1:
            total = sum(shard.bytes for shard in shards)
            index_of_names = {"metadata": {"total_size": total}, "weight_map": names}
            (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index_of_names, indent=1) + "\n")

    def _start(self, path: Path, shard: _Shard) -> None:
        # Larger elements first, as the library does: every tensor is then aligned to its element size.
        order = sorted(shard.entries, key=lambda name: -shard.entries[name][1].itemsize)
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        offsets, end = {}, 0
        for name in order:
            shape, dtype = shard.entries[name]
            offsets[name], end = end, end + math.prod(shape) * dtype.itemsize
            span = [offsets[name], end]
            header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": span}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = path.open("wb")
        self._files.append(file)
        file.write(len(text).to_bytes(8, "little") + text)
        start = 8 + len(text)
        for name in order:
            first, stop = header[name]["data_offsets"]
            self._places[name] = (file, start + first, start + stop)

    def write(self, name: str, rows: Tensor) -> None:
        """The next rows of a tensor, which may be all of them."""
        file, place, end = self._places[name]
        data = rows.contiguous().view(-1).view(torch.uint8).numpy()
        if place + data.nbytes > end:
            raise ValueError(f"'{name}' is longer than it was declared to be")
        file.seek(place)
        file.write(data.data)
        self._places[name] = (file, place + data.nbytes, end)

    def finish(self) -> None:
        """Close the files; raises ValueError if a tensor is incomplete."""
        short = [name for name, (_, place, end) in self._places.items() if place != end]
        if short:
            raise ValueError(f"'{short[0]}' was not written completely")
        self.close()

    def close(self) -> None:
        while self._files:
            self._files.pop().close()


def _split(entries: Mapping[str, Entry], limit: int) -> list[_Shard]:
    """Consecutive entries in files of at most `limit` bytes, or of one larger tensor."""
    shards = [_Shard()]
    for name, (shape, dtype) in entries.items():
        size = math.prod(shape) * dtype.itemsize
        if shards[-1].entries and shards[-1].bytes + size > limit:
            shards.append(_Shard())
        shards[-1].entries[name] = (shape, dtype)
        shards[-1].bytes += size
    return shards
