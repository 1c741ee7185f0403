"""The header of a GGUF file, read with every length checked: a bad file is refused before a tensor is read.

A GGUF file is metadata (key, type, value), a table of tensors (name, sizes, type, offset) and the data. Counts, lengths
and offsets come from elsewhere, so none is used before it is known to lie within the file. As in llama.cpp, each tensor
must begin where the one before it ends, padded to the alignment: an offset or a type that is not the file's own shows.
"""

import mmap
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from dist_qft.errors import CorruptFileError, UserError
from dist_qft.storage.lfs_pointer import refuse_lfs_pointer

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_KEPT_ARRAY = 4096  # longer arrays (vocabularies) are checked and not kept
_DEEPEST_ARRAY = 4
_LARGEST_ALIGNMENT = 1 << 20
_SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file. `shape` has the rows first; `offset` counts from the start of the file."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    path: Path


@dataclass
class GgufHeader:
    """Metadata and tensors of a GGUF model, which may be split over several files."""

    path: Path
    metadata: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, GgufTensor] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)

    def number(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """An integer of the metadata. Raises CorruptFileError if it is missing, no integer or out of bounds."""
        value = self.metadata.get(key, default)
        if type(value) is not int or not low <= value <= high:
            raise CorruptFileError(f"{self.path}: '{key}': got {value!r}, must be an integer from {low} to {high}")
        return value

    def real(self, key: str) -> float | None:
        """A finite positive number of the metadata, None if it is missing. Raises CorruptFileError for any other."""
        value = self.metadata.get(key)
        if value is None:
            return None
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise CorruptFileError(f"{self.path}: '{key}': got {value!r}, must be a positive number")
        return float(value)

    def text(self, key: str) -> str | None:
        """A string of the metadata, None if it is missing. Raises CorruptFileError for anything else."""
        value = self.metadata.get(key)
        if value is not None and not isinstance(value, str):
            raise CorruptFileError(f"{self.path}: '{key}': got {value!r}, must be a string")
        return value


def read_header(path: Path) -> GgufHeader:
    """The header of a model, of all its files if it is split (`<name>-00001-of-00004.gguf`).

    Raises:
        UserError: a file that is not there, or of a byte order or version that is not read.
        CorruptFileError: anything in a header that is not as it must be.
    """
    parts = _parts(path)
    header = _read_file(parts[0])
    header.path, header.files = path, parts
    count = header.metadata.get("split.count", 1)
    if count not in (0, len(parts)):
        raise UserError(
            f"{path}: part of a model in {count} files; model.path must name the first, '...-00001-of-{count:05d}.gguf'"
        )
    for number, part in enumerate(parts[1:], 1):
        other = _read_file(part)
        if other.metadata.get("split.no") != number:
            raise CorruptFileError(f"{part}: 'split.no': got {other.metadata.get('split.no')}, must be {number}")
        if twice := other.tensors.keys() & header.tensors.keys():
            raise CorruptFileError(f"{part}: tensor '{min(twice)}' is also in another part")
        header.tensors |= other.tensors
    total = header.metadata.get("split.tensors.count")
    if len(parts) > 1 and total is not None and total != len(header.tensors):
        raise CorruptFileError(f"{path}: {len(header.tensors)} tensors in {len(parts)} files, must be {total}")
    return header


def _parts(path: Path) -> list[Path]:
    match = _SPLIT_NAME.fullmatch(path.name)
    count = int(match["count"]) if match else 1
    if match is None or count < 2:
        return [path]
    parts = [path.with_name(f"{match['stem']}-{number:05d}-of-{match['count']}.gguf") for number in range(1, count + 1)]
    missing = [part for part in parts if not part.is_file()]
    if missing:
        raise UserError(f"model.path: no file '{missing[0]}' ({len(missing)} of {count} missing)")
    return parts


def _read_file(path: Path) -> GgufHeader:
    refuse_lfs_pointer(path, "model.path")
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if size < 24:
                raise CorruptFileError(f"{path}: not a readable GGUF file: {size} bytes")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(_Cursor(path, data, size))
    except OSError as error:
        raise UserError(f"model.path: cannot read '{path}': {error.strerror}") from error


def _parse(cursor: "_Cursor") -> GgufHeader:
    if cursor.take(4) != _MAGIC:
        raise cursor.fault("it does not begin with 'GGUF'")
    version = cursor.scalar("I")
    if version & 0xFFFF == 0:
        raise UserError(f"{cursor.path}: a big-endian GGUF file; must be little-endian")
    if version not in _VERSIONS:
        raise UserError(f"{cursor.path}: GGUF version {version}, must be {' or '.join(map(str, _VERSIONS))}")
    tensor_count = cursor.count("tensors", smallest=8 + 4 + 8 + 4 + 8)
    key_count = cursor.count("metadata keys", smallest=8 + 4 + 1)
    header = GgufHeader(cursor.path)
    for _ in range(key_count):
        key = cursor.string("a metadata key")
        if key in header.metadata:
            raise cursor.fault(f"the metadata key '{key[:80]}' comes twice")
        header.metadata[key] = cursor.value(cursor.scalar("I"), key)
    infos = [_tensor_info(cursor) for _ in range(tensor_count)]
    alignment = header.metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= _LARGEST_ALIGNMENT or alignment & (alignment - 1):
        raise cursor.fault(f"'general.alignment': got {alignment!r}, must be a power of two")
    header.tensors = {tensor.name: tensor for tensor in _placed(cursor, infos, alignment)}
    if len(header.tensors) < len(infos):
        raise cursor.fault("two tensors have the same name")
    return header


@dataclass(frozen=True)
class _Info:
    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int


def _tensor_info(cursor: "_Cursor") -> _Info:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    name = cursor.string("a tensor's name")
    dimensions = cursor.scalar("I")
    if not 1 <= dimensions <= 4:
        raise cursor.fault(f"tensor '{name}' has {dimensions} dimensions, must be 1 to 4")
    sizes = [cursor.scalar("Q") for _ in range(dimensions)]
    number, offset = cursor.scalar("I"), cursor.scalar("Q")
    try:
        kind = GGMLQuantizationType(number)
        block, block_bytes = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise cursor.fault(f"tensor '{name}' is of type {number}, which is not known") from None
    if min(sizes) < 1 or prod(sizes) > cursor.size * block:
        raise cursor.fault(f"tensor '{name}' has sizes {sizes}, more than the file can hold")
    if sizes[0] % block:
        raise cursor.fault(f"tensor '{name}' has rows of {sizes[0]}, {kind.name} needs a multiple of {block}")
    return _Info(name, kind.name, tuple(reversed(sizes)), prod(sizes) // block * block_bytes, offset)


def _placed(cursor: "_Cursor", infos: list[_Info], alignment: int) -> Iterator[GgufTensor]:
    """The tensors at their places in the file; refuses offsets other than the only possible ones."""
    start, expected = _padded(cursor.at, alignment), 0
    for info in infos:
        if info.offset != expected:
            raise cursor.fault(f"tensor '{info.name}' has offset {info.offset}, must be {expected}")
        if start + expected + info.nbytes > cursor.size:
            raise cursor.fault(f"cut short inside tensor '{info.name}'")
        yield GgufTensor(info.name, info.type, info.shape, start + expected, info.nbytes, cursor.path)
        expected = _padded(expected + info.nbytes, alignment)
    if infos and cursor.size - (start + expected) >= alignment:
        raise cursor.fault(f"{cursor.size - start - expected} bytes after tensor '{infos[-1].name}' belong to none")


def _padded(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


class _Cursor:
    """A place in a file; every step is checked against the bytes that remain."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.size, self.at = path, size, 0
        self._data = data

    def fault(self, reason: str) -> CorruptFileError:
        return CorruptFileError(f"{self.path}: not a readable GGUF file: {reason}")

    def take(self, length: int) -> bytes:
        if length > self.size - self.at:
            raise self.fault("cut short inside its header")
        self.at += length
        return self._data[self.at - length : self.at]

    def scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def count(self, what: str, smallest: int) -> int:
        """A number of things of at least `smallest` bytes each."""
        number = self.scalar("Q")
        if number > (self.size - self.at) // smallest:
            raise self.fault(f"{number} {what} in {self.size} bytes")
        return number

    def string(self, what: str) -> str:
        length = self.count(f"bytes of {what}", smallest=1)
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise self.fault(f"{what} is not UTF-8: {error.reason}") from None

    def value(self, kind: int, key: str, depth: int = 0) -> Any:
        """A metadata value. A long array is checked to be whole, and comes back as None."""
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string(f"'{key[:80]}'")
        if kind != _ARRAY or depth == _DEEPEST_ARRAY:
            raise self.fault(f"'{key[:80]}' is of type {kind}, which is not known")
        element = self.scalar("I")
        code = _SCALARS.get(element)
        length = self.count(f"values of '{key[:80]}'", smallest=struct.calcsize(code) if code else 8)
        if code is not None:
            raw = self.take(length * struct.calcsize(code))
            return list(struct.unpack(f"<{length}{code}", raw)) if length <= _KEPT_ARRAY else None
        if element == _STRING:
            self._skip_strings(length, key)
            return None
        return [self.value(element, key, depth + 1) for _ in range(length)]

    def _skip_strings(self, count: int, key: str) -> None:
        data, at, size = self._data, self.at, self.size
        unpack = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at + 8 > size:
                break
            at += 8 + unpack(data, at)[0]
        if at > size:
            raise self.fault(f"a string of '{key[:80]}' is longer than the file")
        self.at = at
