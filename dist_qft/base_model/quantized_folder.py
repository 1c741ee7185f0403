"""Our own folder of a quantized model: what `merge --to quantized` writes, and a base like any other.

    config.json, tokenizer files     as in a Hugging Face folder
    packed*.safetensors              `<module path>.<packed tensor>` of every frozen weight; norms and biases by name
    quantization.json                the formats: the config section they came from, and format and shape by module

The weights' files are not called model.safetensors: a loader that does not know the packed formats must find
nothing, not start with random weights.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from dist_qft.base_model.sources import Rows, SafetensorsSource
from dist_qft.config.schema import QuantizationConfig
from dist_qft.errors import CorruptFileError, UserError
from dist_qft.quant.contract import Format

QUANTIZATION_FILE = "quantization.json"
WEIGHTS_NAME = "packed"
_VERSION = 1


def is_quantized_folder(path: Path) -> bool:
    return (path / QUANTIZATION_FILE).is_file()


class QuantizedSource:
    """The packed tensors of such a folder; a packed weight goes by the name `<module path>.weight`.

    `formats` is what `Format.describe` says of each, by module path.
    """

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        manifest = _manifest(folder)
        self._weights, self._section = manifest["weights"], manifest.get("quantization")
        self.formats: dict[str, dict[str, Any]] = {path: entry["format"] for path, entry in self._weights.items()}
        self._files = SafetensorsSource(folder)

    def names(self) -> set[str]:
        packed = {f"{path}.{key}" for path, entry in self._weights.items() for key in entry["tensors"]}
        return (self._files.names() - packed) | {f"{path}.weight" for path in self._weights}

    def shape(self, name: str) -> tuple[int, ...]:
        entry = self._weights.get(name.removesuffix(".weight"))
        return self._files.shape(name) if entry is None else tuple(entry["shape"])

    def read(self, name: str, rows: Rows = None) -> Tensor:
        entry = self._weights.get(name.removesuffix(".weight"))
        if entry is not None:
            raise UserError(f"{self.where}: '{name}' is stored as {entry['format']} and is not quantized anew")
        return self._files.read(name, rows)

    def holds(self, name: str, format: Format) -> bool:
        return self.formats.get(name.removesuffix(".weight")) == format.describe()

    def read_packed(self, name: str, format: Format, rows: Rows = None) -> dict[str, Tensor]:
        path = name.removesuffix(".weight")
        shape = self.shape(name)
        first, stop = rows or (0, shape[0])
        packed = {}
        for key in format.packed_shapes(shape):
            per_entry = format.rows_per_entry(key)
            span = None if per_entry is None else (first // per_entry, stop // per_entry)
            packed[key] = self._files.read(f"{path}.{key}", span)
        return packed

    def section(self) -> QuantizationConfig:
        """The config section from which the folder's formats came."""
        try:
            return QuantizationConfig.model_validate(self._section)
        except ValidationError as error:
            raise CorruptFileError(f"{self.where}/{QUANTIZATION_FILE}: not a quantization section: {error}") from error


def manifest_of(quantization: QuantizationConfig, weights: Mapping[str, tuple[Format, tuple[int, int]]]) -> dict:
    """The content of quantization.json; `weights` gives format and shape of every packed weight by module path."""
    return {
        "version": _VERSION,
        "quantization": quantization.model_dump(),
        "weights": {
            path: {"format": format.describe(), "shape": list(shape), "tensors": list(format.packed_shapes(shape))}
            for path, (format, shape) in weights.items()
        },
    }


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / QUANTIZATION_FILE
    try:
        manifest = json.loads(path.read_bytes())
        if manifest["version"] != _VERSION:
            raise UserError(f"{path}: version {manifest['version']}, this program reads {_VERSION}")
        for entry in manifest["weights"].values():
            rows, columns = entry["shape"]
            if not (isinstance(entry["format"], dict) and rows * columns > 0 and isinstance(entry["tensors"], list)):
                raise ValueError(f"entry {entry}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(f"{path}: not a description of quantized weights: {error}") from error
    return manifest
