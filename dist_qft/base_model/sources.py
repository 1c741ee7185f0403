"""The sources of weights: safetensors folders and GGUF files, read tensor by tensor, part by part.

A source knows names, shapes and how to read some rows; it keeps no weight in memory. Names are those of the files, or
of the Hugging Face model where a source translates them (GGUF); `model_tensors` makes the model's tensors of them.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dist_qft.base_model.model_files import model_files
from dist_qft.errors import CorruptFileError, UserError
from dist_qft.quant.contract import Format
from dist_qft.storage.lfs_pointer import refuse_lfs_pointer

_FLOATS = ("F64", "F32", "F16", "BF16")
# Tensor types by the names that safetensors gives them; those that this torch lacks are left out.
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, attribute)
    for name, attribute in {
        "F64": "float64",
        "F32": "float32",
        "F16": "float16",
        "BF16": "bfloat16",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2",
        "F8_E8M0": "float8_e8m0fnu",
        "I64": "int64",
        "I32": "int32",
        "I16": "int16",
        "I8": "int8",
        "U64": "uint64",
        "U32": "uint32",
        "U16": "uint16",
        "U8": "uint8",
        "BOOL": "bool",
    }.items()
    if hasattr(torch, attribute)
}

Rows = tuple[int, int] | None  # first and one-past-last row; None is all


class TensorSource(Protocol):
    """Named tensors in files."""

    where: str

    def names(self) -> set[str]:
        """Names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it."""

    def is_float(self, name: str) -> bool:
        """True if the tensor holds floats, or weights in a format that stands for floats."""

    def kind(self, name: str) -> str | None:
        """The way in which the file quantizes the tensor, in words for messages; None if it holds floats."""

    def stored_format(self, name: str) -> Format | None:
        """The format in which `read_packed` gives the tensor, code for code; None if the file has no such codes."""

    def kept_format(self, name: str) -> Format | None:
        """The format that `quantization: auto` holds the tensor in: the stored one, or one that loses little by it.

        None for floats, and for weights that are to be quantized as floats are.
        """

    def read_packed(self, name: str, rows: Rows = None) -> dict[str, Tensor]:
        """The packed tensors of some rows (multiples of the stored format's `row_alignment`), shared tensors whole."""

    def read(self, name: str, rows: Rows = None) -> Tensor:
        """Rows of one tensor as floats, dequantized if need be; to be read, not written to nor kept."""


def dequantized_rows(source: TensorSource, name: str, rows: Rows) -> Tensor:
    """Any entries of dim 0, as float32, of a tensor that `source` holds packed."""
    format = source.stored_format(name)
    if format is None:
        raise ValueError(f"'{name}' is not packed")
    whole = source.shape(name)
    height, width = rows_and_columns(whole)
    per_entry = height // whole[0]
    start, stop = (0, height) if rows is None else (rows[0] * per_entry, rows[1] * per_entry)
    found = _dequantized_rows(source, name, format, (height, width), start, stop)
    return found if len(whole) == 2 else found.view(-1, *whole[1:])


def rows_and_columns(shape: Sequence[int]) -> tuple[int, int]:
    """A weight's shape, or a stack's, as that of one matrix: all dimensions but the last are rows."""
    return math.prod(shape[:-1]), shape[-1]


def _dequantized_rows(
    source: TensorSource, name: str, format: Format, shape: tuple[int, int], start: int, stop: int
) -> Tensor:
    height, width = shape
    align = format.row_alignment
    first, last = start // align * align, min(height, -(-stop // align) * align)
    format, packed = packed_rows_alone(source, name, format, (first, last))
    return format.dequantize(packed, (last - first, width), torch.float32)[start - first : stop - first]


def packed_rows_alone(
    source: TensorSource, name: str, format: Format, rows: tuple[int, int]
) -> tuple[Format, dict[str, Tensor]]:
    """Rows of a tensor that `source` holds in `format`, and the format in which they stand without the others.

    rows: multiples of the format's `row_alignment`, all dimensions but the last counted as rows.
    """
    if format.row_format is None:
        return format, source.read_packed(name, rows)
    shape = rows_and_columns(source.shape(name))
    return format.row_format, format.row_part(source.read_packed(name), shape, *rows)


@dataclass(frozen=True)
class _Entry:
    """The place of a tensor in a safetensors file; `start` is its first byte in the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int


class FloatSource:
    """The part of `TensorSource` that is the same for all sources of plain floats."""

    def kind(self, name: str) -> str | None:
        return None

    def stored_format(self, name: str) -> Format | None:
        return None

    def kept_format(self, name: str) -> Format | None:
        return None

    def read_packed(self, name: str, rows: Rows = None) -> dict[str, Tensor]:
        raise NotImplementedError(f"{name}: nothing here is packed")


class SafetensorsSource(FloatSource):
    """A Hugging Face folder: one safetensors file or several with an index."""

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        self._entries: dict[str, _Entry] = {}
        for path in model_files(folder):
            for name, entry in _read_header(path).items():
                if name in self._entries:
                    raise CorruptFileError(f"{path}: tensor '{name}' is also in {self._entries[name].path.name}")
                self._entries[name] = entry

    def names(self) -> set[str]:
        return set(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> str:
        """The tensor's type as safetensors names it: F32, BF16, U8, ..."""
        return self._entries[name].dtype

    def is_float(self, name: str) -> bool:
        return self._entries[name].dtype in _FLOATS

    def read(self, name: str, rows: Rows = None) -> Tensor:
        return self.read_box(name, () if rows is None else (rows,))

    def read_box(self, name: str, box: Sequence[tuple[int, int]]) -> Tensor:
        """A part of one tensor: for each dimension the first and one past the last index; missing ones are whole."""
        entry = self._entries[name]
        if entry.dtype not in DTYPES:
            raise UserError(f"{entry.path}: tensor '{name}' is stored as {entry.dtype}, which cannot be read")
        return _read(entry, (*box, *((0, size) for size in entry.shape[len(box) :])))

    def read_rows(self, name: str, width: int, first: int, stop: int) -> Tensor:
        """Rows first..stop of a tensor seen as a matrix (n, width), which its elements fill in their order."""
        entry = self._entries[name]
        matrix = replace(entry, shape=(math.prod(entry.shape) // width, width))
        return _read(matrix, ((first, stop), (0, width)))


def read_box(source: TensorSource, name: str, box: Sequence[tuple[int, int]]) -> Tensor:
    """A part of one tensor of any source; more than that part is read only where the source knows no other way."""
    if isinstance(source, SafetensorsSource):
        return source.read_box(name, box)
    part = source.read(name, box[0]) if box else source.read(name)
    return part[(slice(None), *(slice(*span) for span in box[1:]))] if len(box) > 1 else part


def require_finite(source: TensorSource, name: str, values: Tensor) -> None:
    """Raise UserError if the values that were read of a tensor are not all finite."""
    if not torch.isfinite(values).all():
        raise UserError(f"{source.where}: tensor '{name}' holds a value that is not finite")


def _read_header(path: Path) -> dict[str, _Entry]:
    """The entries of a safetensors file, from its header. The library itself checks the file."""
    refuse_lfs_pointer(path, "model.path")
    try:
        with safe_open(path, "pt"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError) as error:
        raise CorruptFileError(f"{path}: not a readable safetensors file: {error}") from error
    return {
        name: _Entry(path, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _read(entry: _Entry, box: Sequence[tuple[int, int]]) -> Tensor:
    """A box of a tensor, with one reading for each of its contiguous pieces.

    Of a matrix, whole rows are read if the box has most of their columns.
    """
    dtype, shape = DTYPES[entry.dtype], entry.shape
    if len(shape) > 2 and any(span != (0, size) for span, size in zip(box[1:], shape[1:], strict=True)):
        stride = math.prod(shape[1:]) * dtype.itemsize
        inner = (_Entry(entry.path, entry.dtype, shape[1:], entry.start + i * stride) for i in range(*box[0]))
        matrices = [_read(matrix, box[1:]) for matrix in inner]
        return torch.stack(matrices) if matrices else torch.empty([stop - start for start, stop in box], dtype=dtype)
    if len(box) == 2 and 2 * (box[1][1] - box[1][0]) < shape[1]:
        return _read_columns(entry, dtype, box[0], box[1])
    first, stop = box[0] if box else (0, 1)
    width = math.prod(shape[1:])
    data = torch.empty((stop - first) * width, dtype=dtype)
    with entry.path.open("rb", buffering=0) as file:
        file.seek(entry.start + first * width * dtype.itemsize)
        _fill(file, data.view(torch.uint8).numpy().data, entry.path)
    if not box:
        return data.view(())
    rows = data.view(stop - first, *shape[1:])
    return rows[:, slice(*box[1])] if len(box) == 2 else rows


def _read_columns(entry: _Entry, dtype: torch.dtype, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    data = torch.empty((rows[1] - rows[0], columns[1] - columns[0]), dtype=dtype)
    if not data.numel():
        return data
    stride = entry.shape[1] * dtype.itemsize
    with entry.path.open("rb", buffering=0) as file:
        for row, part in zip(range(*rows), data.view(torch.uint8).numpy(), strict=True):
            file.seek(entry.start + row * stride + columns[0] * dtype.itemsize)
            _fill(file, memoryview(part), entry.path)
    return data


def _fill(file: FileIO, buffer: memoryview, path: Path) -> None:
    """Read exactly as many bytes as the buffer has; the system may give fewer at a time."""
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])
        if not count:
            raise CorruptFileError(f"{path}: cut short while it was read")
        done += count
