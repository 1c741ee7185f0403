"""A GGUF file: the base's own file with the adapted layers changed, everything else copied byte for byte.

Where an adapted layer is Q4_1 already, as many bytes change as there are float16 `m` fields: the file is copied and
patched in place. Where one is F16 or another type, its size changes and the whole file is written anew by the gguf
library, metadata and untouched tensors as they are. Rows of the attention's q and k are stored permuted (see
`GgufSource.row_order`), so rows go back to the file's order here.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from dist_qft.base_model.gguf_file import GGUF_TWINS, GgufSource
from dist_qft.merge.collective import frozen_weights
from dist_qft.merge.difference import Difference
from dist_qft.merge.merged_weight import merged_weight
from dist_qft.merge.recipe import GGUF_FORMAT, Recipe
from dist_qft.quant.affine4 import q4_1_from_affine4
from dist_qft.tuned_model.assemble import Assembled

_BLOCK_BYTES = 20  # of Q4_1: float16 d, float16 m, 32 codes
_M = slice(2, 4)


class GgufWriter:
    """Writes one GGUF file; see `collective.Writer`. Adapted layers are affine4 [1, 32], held or quantized anew."""

    def __init__(self, parts: Assembled, recipe: Recipe, source: Path) -> None:
        self.recipe, self.difference = recipe, Difference()
        self._path = source
        self._source = GgufSource(source)
        self._weights = frozen_weights(parts.base)
        self._adapters = parts.trainables.by_path
        self._patches = all(self._is_q4_1(path) for path in recipe.tiles)
        self._output: PatchedFile | RewrittenFile | None = None

    def notes(self) -> list[str]:
        others = [
            f"{path} ({self._source.kind(f'{path}.weight')}, held as {weight.format.name})"
            for path, weight in self._weights.items()
            if path not in self.recipe.tiles and not self._held_as_stored(path)
        ]
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        return [f"the file keeps its own {others[0]}{more}"] if others else []

    def wanted(self, path: str) -> tuple[str, ...]:
        if path not in self.recipe.tiles:
            return ()
        return ("zero",) if self._only_zeros_change(path) else tuple(self._weights[path].packed())

    def begin(self, temporary: Path) -> None:
        if self._patches:
            self._output = PatchedFile(self._path, temporary)
        else:
            in_order = [self._stored_name(path) for path in self._weights if path in self.recipe.tiles]
            self._output = RewrittenFile(self._path, temporary, in_order)

    def write(self, path: str, packed: Mapping[str, Tensor]) -> None:
        order = self._source.row_order(f"{path}.weight")
        if self._only_zeros_change(path):
            self._output.write_zeros(self._stored_name(path), _file_rows(packed["zero"], order))
            return
        weight = self._weights[path]
        if path in self.recipe.formats:
            adapter = self._adapters.get(path)
            exact = merged_weight(weight.format, packed, weight.weight_shape, adapter, torch.float32)
            packed = GGUF_FORMAT.quantize(exact, path)
            self.difference.add(GGUF_FORMAT.dequantize(packed, weight.weight_shape, torch.float32), exact)
        raw = q4_1_from_affine4(packed, weight.weight_shape)
        self._output.write(self._stored_name(path), _file_rows(raw, order))

    def finish(self) -> None:
        self._output.close()

    def close(self) -> None:
        if self._output is not None:
            self._output.close()

    def _stored_name(self, path: str) -> str:
        return self._source.stored_name(f"{path}.weight")

    def _is_q4_1(self, path: str) -> bool:
        return self._source.kind(f"{path}.weight") == "Q4_1"

    def _only_zeros_change(self, path: str) -> bool:
        return self._is_q4_1(path) and self._patches and self.recipe.folds(path)

    def _held_as_stored(self, path: str) -> bool:
        """Whether the run computed with just what the file holds; a dense weight is held as it was read."""
        format, kind = self._weights[path].format, self._source.kind(f"{path}.weight")
        return format.name == "dense" or GGUF_TWINS.get(format, ("",))[0] == kind


class PatchedFile:
    """A copy of a GGUF file in which tensors are overwritten by others of the same size."""

    def __init__(self, source: Path, target: Path) -> None:
        reader = gguf.GGUFReader(source)
        self._places = {tensor.name: (int(tensor.data_offset), int(tensor.n_bytes)) for tensor in reader.tensors}
        del reader  # it maps the whole file
        shutil.copyfile(source, target)
        self._file = target.open("r+b")

    def write(self, name: str, raw: np.ndarray) -> None:
        offset, size = self._places[name]
        if raw.nbytes != size:
            raise ValueError(f"'{name}': {raw.nbytes} bytes for a tensor of {size}")
        self._file.seek(offset)
        self._file.write(np.ascontiguousarray(raw))

    def write_zeros(self, name: str, zeros: np.ndarray) -> None:
        """Replace the `m` fields of a Q4_1 tensor; `zeros` is float16, one per block."""
        offset, size = self._places[name]
        self._file.seek(offset)
        raw = np.frombuffer(bytearray(self._file.read(size)), dtype=np.uint8)
        raw.reshape(-1, _BLOCK_BYTES)[:, _M] = zeros.astype("<f2").reshape(-1, 1).view(np.uint8)
        self.write(name, raw)

    def close(self) -> None:
        self._file.close()


class RewrittenFile:
    """A GGUF file with the metadata of another, its tensors, and some of them replaced by Q4_1 in a given order."""

    def __init__(self, source: Path, target: Path, replaced: list[str]) -> None:
        reader = gguf.GGUFReader(source)
        architecture = reader.get_field(gguf.Keys.General.ARCHITECTURE).contents()
        self._writer = gguf.GGUFWriter(target, architecture, endianess=reader.endianess)
        self._copy_metadata(reader)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        kept = [tensor for tensor in reader.tensors if tensor.name not in replaced]
        for tensor in kept:
            data = tensor.data
            self._writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
        for name in replaced:
            columns, rows = (int(size) for size in tensors[name].shape)
            shape = (rows, columns // 32 * _BLOCK_BYTES)
            kind = gguf.GGMLQuantizationType.Q4_1
            self._writer.add_tensor_info(name, shape, np.dtype(np.uint8), shape[0] * shape[1], kind)
        self._remaining = list(replaced)
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_ti_data_to_file()
        for tensor in kept:
            offset, size = int(tensor.data_offset), int(tensor.n_bytes)
            self._writer.write_tensor_data(np.fromfile(source, np.uint8, size, offset=offset))

    def write(self, name: str, raw: np.ndarray) -> None:
        if not self._remaining or self._remaining.pop(0) != name:
            raise ValueError(f"'{name}' came out of turn")
        self._writer.write_tensor_data(np.ascontiguousarray(raw))

    def close(self) -> None:
        self._writer.close()

    def _copy_metadata(self, reader: gguf.GGUFReader) -> None:
        for field in reader.fields.values():
            # The library writes the header's own counts and the architecture itself.
            if field.name.startswith("GGUF.") or field.name == gguf.Keys.General.ARCHITECTURE:
                continue
            value, kind = field.contents(), field.types[0]
            if field.name == gguf.Keys.General.FILE_TYPE:
                value = int(gguf.LlamaFileType.MOSTLY_Q4_1)
            element = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            self._writer.add_key_value(field.name, value, kind, sub_type=element)


def _file_rows(rows: Tensor, order: np.ndarray | None) -> np.ndarray:
    """Rows in the model's order, put into the file's."""
    if order is None:
        return rows.numpy()
    result = np.empty_like(rows.numpy())
    result[order] = rows.numpy()
    return result
