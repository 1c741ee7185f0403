"""GGUF files made from others: patched in place where no size changes, else written anew."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from dist_qft.base_model.gguf_metadata import MetadataReader
from dist_qft.errors import CorruptFileError

BLOCK_BYTES = 20  # of Q4_1: float16 d, float16 m, 32 codes
_M = slice(2, 4)
_VALUE = slice(2, None)  # of the parts of a field: its type and value, after the length and bytes of its name


class PatchedFile:
    """A copy of a GGUF file in which tensors are overwritten by others of the same size."""

    def __init__(self, source: Path, target: Path) -> None:
        reader = MetadataReader(source)
        self._places = {tensor.name: (int(tensor.data_offset), int(tensor.n_bytes)) for tensor in reader.tensors}
        del reader  # it maps the whole file
        shutil.copyfile(source, target)
        self._file = target.open("r+b")

    def write(self, name: str, raw: np.ndarray) -> None:
        offset, size = self._places[name]
        if raw.nbytes != size:
            raise ValueError(f"'{name}': {raw.nbytes} bytes for a tensor of {size}")
        self._file.seek(offset)
        self._file.write(np.ascontiguousarray(raw).data)

    def write_zeros(self, name: str, zeros: np.ndarray) -> None:
        """Replace the `m` fields of a Q4_1 tensor; `zeros` is float16, one per block."""
        offset, size = self._places[name]
        self._file.seek(offset)
        raw = np.frombuffer(bytearray(self._file.read(size)), dtype=np.uint8)
        raw.reshape(-1, BLOCK_BYTES)[:, _M] = zeros.astype("<f2").reshape(-1, 1).view(np.uint8)
        self.write(name, raw)

    def close(self) -> None:
        self._file.close()


class _Writer(gguf.GGUFWriter):
    """`gguf.GGUFWriter` that takes bytes of another file for a value, too: its own form of arrays has no empty ones."""

    def _pack_val(self, val: Any, *arguments: Any, **keywords: Any) -> bytes:
        return val.stored if isinstance(val, _Stored) else super()._pack_val(val, *arguments, **keywords)


@dataclass(frozen=True)
class _Stored:
    """A value of a file's metadata as it is stored there, with its type in front."""

    stored: bytes


class RewrittenFile:
    """One GGUF file with metadata and tensors of others, and some tensors replaced by Q4_1 in a given order.

    Metadata is the first file's, with the texts of `changes` under their keys.
    """

    def __init__(
        self, sources: Sequence[Path], target: Path, replaced: list[str], changes: Mapping[str, str] | None = None
    ) -> None:
        readers = [(source, MetadataReader(source)) for source in sources]
        first, reader = readers[0]
        field = reader.get_field(gguf.Keys.General.ARCHITECTURE)
        if field is None:
            raise CorruptFileError(f"{first}: a GGUF file without '{gguf.Keys.General.ARCHITECTURE}'")
        self._writer = _Writer(target, field.contents(), endianess=reader.endianess)
        self._copy_metadata(reader, changes or {})
        tensors = {tensor.name: tensor for _, each in readers for tensor in each.tensors}
        kept = [(source, tensor) for source, each in readers for tensor in each.tensors if tensor.name not in replaced]
        for _, tensor in kept:
            data = tensor.data
            self._writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
        for name in replaced:
            columns, rows = (int(size) for size in tensors[name].shape)
            shape = (rows, columns // 32 * BLOCK_BYTES)
            kind = gguf.GGMLQuantizationType.Q4_1
            self._writer.add_tensor_info(name, shape, np.dtype(np.uint8), shape[0] * shape[1], kind)
        self._remaining = list(replaced)
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_ti_data_to_file()
        for source, tensor in kept:
            offset, size = int(tensor.data_offset), int(tensor.n_bytes)
            self._writer.write_tensor_data(np.fromfile(source, np.uint8, size, offset=offset))

    def write(self, name: str, raw: np.ndarray) -> None:
        if not self._remaining or self._remaining.pop(0) != name:
            raise ValueError(f"'{name}' came out of turn")
        self._writer.write_tensor_data(np.ascontiguousarray(raw))

    def close(self) -> None:
        self._writer.close()

    def _copy_metadata(self, reader: gguf.GGUFReader, changes: Mapping[str, str]) -> None:
        for key, text in changes.items():
            self._writer.add_string(key, text)
        for field in reader.fields.values():
            if field.name in changes:
                continue
            # The library writes the header's own counts and the architecture itself. The result is not split.
            if field.name.startswith(("GGUF.", "split.")) or field.name == gguf.Keys.General.ARCHITECTURE:
                continue
            value: int | _Stored = int(gguf.LlamaFileType.MOSTLY_Q4_1)
            if field.name == gguf.Keys.General.ALIGNMENT:
                self._writer.data_alignment = int(field.contents())
            if field.name != gguf.Keys.General.FILE_TYPE:
                value = _Stored(b"".join(part.tobytes() for part in field.parts[_VALUE]))
            self._writer.add_key_value(field.name, value, field.types[0])
