"""Weights that a result keeps from the base's files, for a run that held them in another form.

A run may hold a weight otherwise than its file does: an F16 table as q8_0, a Q8_0 matrix as affine4. A result that
keeps the tensor of the file is another model than the live one, and its logits must be computed from that tensor.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dist_qft.base_model.chosen_formats import ChosenFormats
from dist_qft.base_model.model_tensors import ModelTensors, check_names
from dist_qft.base_model.skeleton import BaseModel
from dist_qft.base_model.sources import TensorSource
from dist_qft.base_model.weight_files import stored_quantization
from dist_qft.quant.contract import Format, PackedShapes, Shape
from dist_qft.quant.frozen import FrozenEmbedding, FrozenWeight
from dist_qft.quant.row_update import ChangedRows


@contextmanager
def as_in_files(base: BaseModel, source: TensorSource, paths: Iterable[str]) -> Iterator[None]:
    """Context in which the base computes with weights as its files have them, wherever it holds them otherwise.

    They are read when they are used, and in the form that a reader of these files takes (`stored_quantization`).

    Args:
        paths: the weights that the result keeps from the files.
    """
    tensors, weights = check_names(base, source), base.weights()
    formats, changes = {}, {}
    for path in paths:
        weight = weights[path]
        form = _reader_format(base, tensors, path, weight)
        if form == weight.format:
            continue
        stored = StoredWeight(tensors, f"{path}.weight", form)
        if isinstance(weight, FrozenEmbedding):
            changes[weight] = weight.changed
            weight.changed = StoredRows(stored, weight.changed)
        else:
            formats[weight] = weight.format
            weight.format = StoredFormat(weight.format, stored)
    try:
        yield
    finally:
        for weight, format in formats.items():
            weight.format = format
        for table, changed in changes.items():
            table.changed = changed


def _reader_format(base: BaseModel, tensors: ModelTensors, path: str, weight: FrozenWeight) -> Format:
    """The format in which `dist_qft.load` holds a weight of these files."""
    formats = ChosenFormats(stored_quantization(), tensors.views)
    if isinstance(weight, FrozenEmbedding):
        return formats.table(path, weight.weight_shape)
    return formats.linear(path, exempt=False)


class StoredWeight:
    """A weight in files, as a reader that holds it in `form` computes with it."""

    def __init__(self, tensors: ModelTensors, name: str, form: Format) -> None:
        self._tensors, self._name = tensors, name
        self._stored = tensors.stored_format(name)
        self._form = form

    def rows(self, first: int, stop: int) -> Tensor:
        """Rows first..stop, (stop - first, columns) float32 or the files' own float type."""
        rows = self._tensors.read_rows(self._name, first, stop)
        if self._form.name == "dense" or self._form == self._stored:
            return rows
        return self._form.dequantize(self._form.quantize(rows, self._name), _shape(rows), torch.float32)


class StoredRows:
    """Rows of a vocabulary table as the files have them; see `ChangedRows`.

    Args:
        then: changes of rows that come on top.
    """

    def __init__(self, stored: StoredWeight, then: ChangedRows | None) -> None:
        self._stored, self._then = stored, then

    def among(self, rows: Tensor, ids: Tensor) -> Tensor:
        """See `ChangedRows`."""
        wanted = [self._stored.rows(number, number + 1) for number in ids.tolist()]
        if wanted:
            rows = torch.cat(wanted).to(rows.device, rows.dtype)
        return rows if self._then is None else self._then.among(rows, ids)

    def between(self, rows: Tensor, start: int, stop: int) -> Tensor:
        """See `ChangedRows`."""
        rows = self._stored.rows(start, stop).to(rows.device, rows.dtype)
        return rows if self._then is None else self._then.between(rows, start, stop)


class StoredFormat(Format):
    """A format's packed tensors, in whose place the whole weight is read from the files."""

    name = "stored"

    def __init__(self, held: Format, stored: StoredWeight) -> None:
        self._held, self._stored = held, stored

    @property
    def row_local(self) -> bool:
        """False: a slice of the packed tensors does not say which rows it holds."""
        return False

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "held": self._held.describe()}

    def check(self, shape: Shape, where: str) -> None:
        self._held.check(shape, where)

    def packed_shapes(self, shape: Shape) -> PackedShapes:
        return self._held.packed_shapes(shape)

    def rows_per_entry(self, tensor_name: str) -> int | None:
        return self._held.rows_per_entry(tensor_name)

    def shared(self, tensor_name: str) -> bool:
        return self._held.shared(tensor_name)

    def quantize(self, weight: Tensor, where: str = "weight") -> dict[str, Tensor]:
        raise NotImplementedError("a stored weight is only read")

    def dequantize(
        self, packed: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        device = next(iter(packed.values())).device
        weight = self._stored.rows(0, shape[0]).to(device, dtype)
        return weight if out is None else out.copy_(weight)


def _shape(rows: Tensor) -> Shape:
    return rows.shape[0], rows.shape[1]
