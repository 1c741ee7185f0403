"""A Hugging Face folder in which other programs have quantized weights: their parts read as one tensor each.

Such a folder stores a weight as several tensors (codes, scales, zeros) under its module's name. A reader finds them
and describes each weight as a `StoredWeight`; this source calls it `<module>.weight` and hides its parts.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dist_qft.base_model.sources import Rows, SafetensorsSource, dequantized_rows, require_finite
from dist_qft.errors import CorruptFileError
from dist_qft.quant.contract import Format


@dataclass(frozen=True)
class StoredWeight(ABC):
    """One quantized weight of a folder.

    Attributes:
        module: the module's path; the weight is called `<module>.weight`, or otherwise if `name` says so.
        shape: (out_features, in_features), or (experts, out_features, in_features) of a stack.
        kind: how it is stored, in words.
    """

    module: str
    shape: tuple[int, ...]
    kind: str

    @property
    def name(self) -> str:
        """The name by which the folder's source has the weight."""
        return f"{self.module}.weight"

    @property
    @abstractmethod
    def parts(self) -> tuple[str, ...]:
        """Names of the tensors that belong to it, whether or not they are there."""

    @property
    def format(self) -> Format | None:
        """The format that holds it code for code; None if it is read as floats."""
        return None

    def read_packed(self, files: SafetensorsSource, first: int, stop: int) -> dict[str, Tensor]:
        """The rows first..stop in `format`, all dimensions but the last counted as rows."""
        raise NotImplementedError

    def read_floats(self, files: SafetensorsSource, first: int, stop: int) -> Tensor:
        """The rows first..stop as float32, for a weight without a format; the entries first..stop of a stack."""
        raise NotImplementedError


class PackedFolder:
    """The weights of a folder; those that are not among `stored` are floats and read as in any other."""

    def __init__(self, folder: Path, files: SafetensorsSource, stored: Iterable[StoredWeight]) -> None:
        self.where = str(folder)
        self._files = files
        self._stored = {weight.name: weight for weight in stored}
        hidden = {part for weight in self._stored.values() for part in weight.parts}
        self._names = (files.names() - hidden) | self._stored.keys()

    def names(self) -> set[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored[name].shape if name in self._stored else self._files.shape(name)

    def is_float(self, name: str) -> bool:
        return name in self._stored or self._files.is_float(name)

    def kind(self, name: str) -> str | None:
        return self._stored[name].kind if name in self._stored else None

    def stored_format(self, name: str) -> Format | None:
        return self._stored[name].format if name in self._stored else None

    def kept_format(self, name: str) -> Format | None:
        return self.stored_format(name)

    def read_packed(self, name: str, rows: Rows = None) -> dict[str, Tensor]:
        weight = self._stored[name]
        packed = weight.read_packed(self._files, *(rows or (0, math.prod(weight.shape[:-1]))))
        for key, tensor in packed.items():
            if tensor.dtype in (torch.float16, torch.float32):
                require_finite(self, f"{name}' ({key}) of '{weight.module}", tensor)
        return packed

    def read(self, name: str, rows: Rows = None) -> Tensor:
        weight = self._stored.get(name)
        if weight is None:
            return self._files.read(name, rows)
        if weight.format is not None:
            return dequantized_rows(self, name, rows)
        return weight.read_floats(self._files, *(rows or (0, weight.shape[0])))


def require_part(files: SafetensorsSource, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    """Refuse a part of a weight that is missing, or of another shape or type than it must be. Reads headers only."""
    if name not in files.names():
        raise CorruptFileError(f"{files.where}: has no tensor '{name}'")
    if files.shape(name) != shape or files.dtype(name) not in dtypes:
        found = f"{files.dtype(name)} {list(files.shape(name))}"
        raise CorruptFileError(
            f"{files.where}: tensor '{name}' is {found}, must be {' or '.join(dtypes)} {list(shape)}"
        )


def matrix_shape(files: SafetensorsSource, name: str) -> tuple[int, int]:
    """The shape of a part that must be a matrix. Reads headers only."""
    if name not in files.names():
        raise CorruptFileError(f"{files.where}: has no tensor '{name}'")
    shape = files.shape(name)
    if len(shape) != 2 or min(shape) < 1:
        raise CorruptFileError(f"{files.where}: tensor '{name}' has the shape {list(shape)}, must be a matrix")
    return shape[0], shape[1]
