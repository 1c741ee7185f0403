"""Trained rows of vocabulary tables in a GGUF file: in their table's own type, over the rows that the file has."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from dist_qft.base_model.gguf_file import GgufSource
from dist_qft.base_model.gguf_metadata import MetadataReader
from dist_qft.base_model.gguf_types import FLOATS, GGUF_TYPES
from dist_qft.errors import UserError
from dist_qft.merge.token_rows import TokenRowsInUse, rounding_notes


def require_writable(source: GgufSource, tables: Iterable[str]) -> None:
    """Refuse tables of a type that rows cannot be converted to, before any weight is read. UserError."""
    for path in tables:
        kind = source.gguf_type(f"{path}.weight")
        columns = source.shape(f"{path}.weight")[-1]
        try:
            if kind not in FLOATS and kind not in GGUF_TYPES:  # a reader would round the rows once more
                raise NotImplementedError
            _raw(np.zeros((1, columns), dtype=np.float32), kind)
        except (NotImplementedError, gguf.quants.QuantError):
            raise UserError(
                f"--to gguf: method.train_tokens changes rows of {path}, which the file stores as {kind}; rows are "
                "written as F32, F16, BF16, Q8_0 and other types of one scale per block: merge --to dense or "
                "quantized, or train on a file with such a table"
            ) from None


class GgufRows:
    """The trained rows of each table as bytes of its type in the file."""

    def __init__(self, source: GgufSource, rows: Mapping[str, TokenRowsInUse]) -> None:
        self._rows = rows
        self.types = {path: source.gguf_type(f"{path}.weight") for path in rows}
        self._names = {path: source.stored_name(f"{path}.weight") for path in rows}

    def values(self, path: str) -> Tensor:
        """The rows as a reader of the file gets them, (n, width) float32."""
        raw = _raw(self._rows[path].live.numpy(), self.types[path])
        values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[self.types[path]])
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))

    def notes(self) -> list[str]:
        """Lines on the rows that their type rounds."""
        return rounding_notes({path: self.values(path) for path in self._rows}, self._rows, self.types)

    def write(self, file: Path) -> None:
        """Write the rows over those of a file that is complete."""
        if not self._rows:
            return
        places = {tensor.name: int(tensor.data_offset) for tensor in MetadataReader(file).tensors}
        with file.open("r+b") as opened:
            for path, rows in self._rows.items():
                raw = _raw(rows.live.numpy(), self.types[path]).view(np.uint8)
                for number, row in zip(rows.ids.tolist(), raw, strict=True):
                    opened.seek(places[self._names[path]] + number * row.nbytes)
                    opened.write(row.tobytes())


def _raw(rows: np.ndarray, kind: str) -> np.ndarray:
    """Rows (n, width) float32 in a GGUF type, (n, ...)."""
    return np.ascontiguousarray(gguf.quants.quantize(rows, gguf.GGMLQuantizationType[kind]))
