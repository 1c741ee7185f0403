"""A model folder, whatever its weights' form: small files, safetensors, and norms and biases as the base has them.

Of a multimodal model the folder is the whole again: the other parts byte for byte, and the text decoder's floats
under the names that the base's files give them. Floats of a mixture go under those names, too, each expert's by itself
where the files have it so: other programs read these, and not transformers' stacks.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dist_qft.base_model.model_tensors import ModelTensors, check_names
from dist_qft.base_model.tensor_views import Stored
from dist_qft.base_model.tokenizer import run_tokenizer
from dist_qft.base_model.weight_files import open_source
from dist_qft.config.schema import RunConfig
from dist_qft.merge.difference import Difference
from dist_qft.merge.live_model import LiveModel
from dist_qft.merge.writers.model_files import CONFIG, edit_json, write_model_files
from dist_qft.merge.writers.safetensors_folder import Entry, SafetensorsFolder

FloatRows = Callable[[str, Mapping[str, Tensor]], Iterator[Tensor]]  # of a weight's path and packed tensors


class WeightForm(Protocol):
    """A storage form of frozen weights in a folder: the difference between a quantized and a dense one.

    Attributes:
        stem: of the safetensors files' names.
        dtype: the float type that config.json names.
        difference: the loss of conversions so far.
    """

    stem: str
    dtype: torch.dtype
    difference: Difference

    def entries(self, path: str) -> dict[str, Entry]:
        """Name, shape and dtype of each tensor that stands for one weight."""

    def tensors(self, path: str, packed: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """These tensors, in pieces of consecutive rows."""

    def extra_files(self) -> dict[str, str]:
        """Text files that belong to the form, by name."""

    def config_entries(self, folder: Path) -> dict[str, Any]:
        """The entries of config.json about the form; called when the weights' files have been begun."""


class FolderWriter:
    """A writer of one folder; see `target.Writer`.

    Args:
        float_rows: gives a weight in pieces of consecutive rows, where the folder's weights are plain floats.
        notes: of the certificate.
    """

    def __init__(
        self,
        form: WeightForm,
        live: LiveModel,
        config: RunConfig,
        float_rows: FloatRows | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self._notes = list(notes)
        self._form, self._live, self._config, self._float_rows = form, live, config, float_rows
        self._weights = live.weights()

    def notes(self) -> list[str]:
        return self._notes

    def wanted(self, path: str) -> tuple[str, ...]:
        return tuple(self._weights[path].packed())

    def open(self, temporary: Path) -> "OpenFolder":
        base = self._live.base
        temporary.mkdir()
        write_model_files(temporary, self._config.model, base, self._form.dtype, run_tokenizer(self._config))
        for name, text in self._form.extra_files().items():
            (temporary / name).write_text(text)
        stored = check_names(base, open_source(self._config.model))
        others = {name: stored.read(name) for name, _ in base.dense_parameters()}
        for name in base.buffers:
            others[name] = stored.read(name) if name in stored else base.model.get_buffer(name).cpu()
        entries = {name: entry for path in self._weights for name, entry in self._form.entries(path).items()}
        entries |= {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in others.items()}
        mixture = bool(base.experts) and self._float_rows is not None
        names = stored.names_in_files(base) if base.wrapped or mixture else {}
        experts = stored.tensors_of_experts(base) if mixture else {}
        for path, tensors in experts.items():
            ((whole, (_, dtype)),) = self._form.entries(path).items()
            del entries[whole]
            entries |= {tensor.name: (tensor.shape, dtype) for tensor in tensors}
        entries = {names.get(name, name): entry for name, entry in entries.items()}
        beside = stored.beside(base) if base.wrapped else []
        entries |= {name: self._entry_beside(stored, name) for name in beside}
        files = SafetensorsFolder(temporary, self._form.stem, entries)
        for name, tensor in others.items():
            files.write(names.get(name, name), tensor)
        for name in beside:
            files.write(name, stored.source.read(name).to(entries[name][1]))
        edit_json(temporary / CONFIG, lambda content: content | self._form.config_entries(temporary))
        return OpenFolder(self._form, files, names, experts, self._float_rows)

    def _entry_beside(self, stored: ModelTensors, name: str) -> Entry:
        """Shape and type of a tensor that is copied as it is stored; one that is packed becomes floats."""
        source, shape = stored.source, tuple(stored.source.shape(name))
        if source.kind(name) is not None:
            return shape, self._form.dtype
        return shape, source.read(name, (0, 0) if shape else None).dtype


class OpenFolder:
    """A folder that takes its packed weights; see `target.OpenResult`.

    Args:
        names: what the folder calls a tensor, by the library's name, if not the same.
        experts: the tensors that become one stack, by its path, each with its rows below the one before.
    """

    def __init__(
        self,
        form: WeightForm,
        files: SafetensorsFolder,
        names: Mapping[str, str],
        experts: Mapping[str, Sequence[Stored]],
        float_rows: FloatRows | None,
    ) -> None:
        self._form, self._files, self._names = form, files, names
        self._experts, self._float_rows = experts, float_rows
        self.difference = form.difference

    def write(self, path: str, packed: Mapping[str, Tensor]) -> None:
        if self._float_rows is not None and path in self._experts:
            self._write_experts(self._experts[path], self._float_rows(path, packed))
            return
        for name, rows in self._form.tensors(path, packed):
            self._files.write(self._names.get(name, name), rows)

    def _write_experts(self, tensors: Sequence[Stored], pieces: Iterator[Tensor]) -> None:
        """Write the rows of a stack, which come in pieces, to the tensors that it is made of."""
        for number, rows in _cut(pieces, [math.prod(tensor.shape[:-1]) for tensor in tensors]):
            self._files.write(tensors[number].name, rows)

    def finish(self) -> None:
        self._files.finish()

    def close(self) -> None:
        self._files.close()


def _cut(pieces: Iterable[Tensor], heights: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """Consecutive rows for tensors of these heights, one below the other: each part with its tensor's number."""
    ends = list(itertools.accumulate(heights))
    number = first = 0
    for piece in pieces:
        start = 0
        while start < len(piece):
            if first == ends[number]:
                number += 1
            rows = piece[start : start + ends[number] - first]
            yield number, rows
            start, first = start + len(rows), first + len(rows)
