"""Where weights come from: safetensors folders and GGUF files, read tensor by tensor, rows by rows.

A source knows names, shapes and how to read some rows; it keeps no weight in memory. Names are those of the
Hugging Face model. What `read` returns may be a mapping of the file: as long as nobody keeps it, a rank's resident
memory shows what it keeps.
"""

import json
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dist_qft.errors import CorruptFileError, UserError
from dist_qft.quant.contract import Format

Rows = tuple[int, int] | None  # first and one-past-last row; None is all


class TensorSource(Protocol):
    """Named tensors in files."""

    where: str

    def names(self) -> set[str]:
        """Names of all tensors, as the Hugging Face model calls them."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it."""

    def read(self, name: str, rows: Rows = None) -> Tensor:
        """Rows of one tensor as floats, in the file's own float type; to be read, not written to nor kept.

        Raises UserError for a tensor that must not be quantized once more than it is (`holds` says in which format).
        """

    def holds(self, name: str, format: Format) -> bool:
        """Whether the file has the tensor in this very format, to be had by `read_packed`, or it must be quantized."""

    def read_packed(self, name: str, format: Format, rows: Rows = None) -> dict[str, Tensor]:
        """The packed tensors of some rows (multiples of the format's `row_alignment`; all if not `row_local`)."""


class SafetensorsSource:
    """A Hugging Face folder: one safetensors file or several with an index."""

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in self._list_files(folder):
            try:
                with safe_open(path, "pt") as file:
                    for name in file.keys():  # noqa: SIM118 - not a mapping
                        if name in self._files:
                            raise CorruptFileError(f"{path}: tensor '{name}' is also in {self._files[name].name}")
                        self._files[name] = path
                        self._shapes[name] = tuple(file.get_slice(name).get_shape())
            except (SafetensorError, OSError) as error:
                raise CorruptFileError(f"{path}: not a readable safetensors file: {error}") from error

    @staticmethod
    def _list_files(folder: Path) -> list[Path]:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CorruptFileError(f"{index}: not a safetensors index: {error}") from error
            unsafe = [name for name in names if Path(name).name != name]
            if unsafe:
                raise CorruptFileError(f"{index}: file name '{unsafe[0]}' leaves the folder")
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise UserError(f"{index}: names {missing[0]}, which is not in the folder ({len(missing)} missing)")
            return [folder / name for name in names]
        single = folder / "model.safetensors"
        files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
        if not files:
            raise UserError(f"model.path: '{folder}' has no *.safetensors file (pickled .bin weights are not read)")
        return files

    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str, rows: Rows = None) -> Tensor:
        # The file is opened for each read: the mapped pages leave this process together with the tensor.
        with safe_open(self._files[name], "pt") as file:
            return file.get_tensor(name) if rows is None else file.get_slice(name)[rows[0] : rows[1]]

    def holds(self, name: str, format: Format) -> bool:
        return False

    def read_packed(self, name: str, format: Format, rows: Rows = None) -> dict[str, Tensor]:
        raise NotImplementedError("a plain folder holds nothing packed")


def require_finite(source: TensorSource, name: str, values: Tensor) -> None:
    """Raise UserError if the values that were read of a tensor are not all finite."""
    if not torch.isfinite(values).all():
        raise UserError(f"{source.where}: tensor '{name}' holds a value that is not finite")
