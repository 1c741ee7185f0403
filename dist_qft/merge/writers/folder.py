"""A model folder, whatever its weights' form: small files, safetensors, and norms and biases as the base has them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dist_qft.base_model.load import check_names
from dist_qft.base_model.skeleton import BaseModel
from dist_qft.base_model.weight_files import open_source
from dist_qft.config.schema import ModelConfig
from dist_qft.merge.collective import frozen_weights
from dist_qft.merge.difference import Difference
from dist_qft.merge.writers.model_files import write_model_files
from dist_qft.merge.writers.safetensors_folder import Entry, SafetensorsFolder


class WeightForm(Protocol):
    """How frozen weights are stored in a folder: the seam between a quantized and a dense one."""

    stem: str  # of the safetensors files
    dtype: torch.dtype  # what config.json says
    difference: Difference

    def entries(self, path: str) -> dict[str, Entry]:
        """Name, shape and dtype of each tensor that stands for one weight."""

    def tensors(self, path: str, packed: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """These tensors, in pieces of consecutive rows."""

    def extra_files(self) -> dict[str, str]:
        """Text files that belong to the form, by name."""


class FolderWriter:
    """Writes one folder; see `collective.Writer`."""

    def __init__(self, form: WeightForm, base: BaseModel, model: ModelConfig) -> None:
        self.form, self.base, self.model = form, base, model
        self._weights = frozen_weights(base)
        self._files: SafetensorsFolder | None = None

    @property
    def difference(self) -> Difference:
        return self.form.difference

    def notes(self) -> list[str]:
        return []

    def wanted(self, path: str) -> tuple[str, ...]:
        return tuple(self._weights[path].packed())

    def begin(self, temporary: Path) -> None:
        temporary.mkdir()
        write_model_files(temporary, self.model, self.base, self.form.dtype)
        for name, text in self.form.extra_files().items():
            (temporary / name).write_text(text)
        source = open_source(self.model)
        stored = check_names(self.base, source)
        others = {name: source.read(stored[name]) for name, _ in self.base.dense_parameters()}
        entries = {name: entry for path in self._weights for name, entry in self.form.entries(path).items()}
        entries |= {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in others.items()}
        self._files = SafetensorsFolder(temporary, self.form.stem, entries)
        for name, tensor in others.items():
            self._files.write(name, tensor)

    def write(self, path: str, packed: Mapping[str, Tensor]) -> None:
        for name, rows in self.form.tensors(path, packed):
            self._files.write(name, rows)

    def finish(self) -> None:
        self._files.finish()

    def close(self) -> None:
        if self._files is not None:
            self._files.close()
