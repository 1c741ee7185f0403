"""Our own folder of a quantized model: the result of `merge --to quantized`, and a base like any other.

    config.json, tokenizer files     as in a Hugging Face folder; `quantization_config` says the formats to transformers
    packed*.safetensors              `<module path>.<packed tensor>` of every frozen weight; norms and biases by name
    quantization.json                the formats: the config section they came from, and format and shape by module

The weights' files are not called model.safetensors: a loader that does not know the packed formats must find
nothing, not start with random weights.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dist_qft.base_model.sources import Rows, SafetensorsSource, dequantized_rows, rows_and_columns
from dist_qft.config.schema import QuantizationConfig
from dist_qft.errors import CorruptFileError, UserError
from dist_qft.quant.contract import Format, row_entries
from dist_qft.quant.formats import described_format

QUANTIZATION_FILE = "quantization.json"
WEIGHTS_NAME = "packed"
SINGLE_FILE = f"{WEIGHTS_NAME}.safetensors"
METHOD = "dist_qft"  # `quant_method` in config.json
_VERSION = 1

Described = tuple[Format, tuple[int, ...]]  # format, and shape with every dimension of the weight


def is_quantized_folder(path: Path) -> bool:
    return (path / QUANTIZATION_FILE).is_file()


class QuantizedSource:
    """The packed tensors of such a folder; a packed weight goes by the name `<module path>.weight`."""

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        self._weights = _manifest(folder)["weights"]
        described = described_weights(self._weights, str(folder / QUANTIZATION_FILE))
        self._formats = {path: format for path, (format, _) in described.items()}
        self._files = SafetensorsSource(folder)

    def names(self) -> set[str]:
        packed = {f"{path}.{key}" for path, entry in self._weights.items() for key in entry["tensors"]}
        return (self._files.names() - packed) | {f"{path}.weight" for path in self._weights}

    def shape(self, name: str) -> tuple[int, ...]:
        entry = self._weights.get(name.removesuffix(".weight"))
        return self._files.shape(name) if entry is None else tuple(entry["shape"])

    def is_float(self, name: str) -> bool:
        return self.stored_format(name) is not None or self._files.is_float(name)

    def kind(self, name: str) -> str | None:
        format = self.stored_format(name)
        return None if format is None else format.words

    def stored_format(self, name: str) -> Format | None:
        return self._formats.get(name.removesuffix(".weight"))

    def kept_format(self, name: str) -> Format | None:
        return self.stored_format(name)

    def read_packed(self, name: str, rows: Rows = None) -> dict[str, Tensor]:
        path = name.removesuffix(".weight")
        format, (height, width) = self._formats[path], rows_and_columns(self.shape(name))
        first, stop = rows or (0, height)
        packed = {}
        for key, (tensor_shape, _) in format.packed_shapes((height, width)).items():
            span = None if format.shared(key) else row_entries(tensor_shape[0], height, first, stop)
            packed[key] = self._files.read(f"{path}.{key}", span)
        return packed

    def read(self, name: str, rows: Rows = None) -> Tensor:
        return self._files.read(name, rows) if self.stored_format(name) is None else dequantized_rows(self, name, rows)


def manifest_of(quantization: QuantizationConfig, weights: Mapping[str, Described]) -> dict[str, Any]:
    """The content of quantization.json; `weights` gives format and shape of every packed weight by module path."""
    return {
        "version": _VERSION,
        "quantization": quantization.model_dump(),
        "weights": {
            path: {
                "format": format.describe(),
                "shape": list(shape),
                "tensors": list(format.packed_shapes(rows_and_columns(shape))),
            }
            for path, (format, shape) in weights.items()
        },
    }


def transformers_settings(manifest: Mapping[str, Any], weights_file: str) -> dict[str, Any]:
    """The `quantization_config` that config.json gets; see `transformers_quantizer`."""
    return {"quant_method": METHOD, "weights_file": weights_file, "weights": manifest["weights"]}


def described_weights(weights: Mapping[str, Any], where: str) -> dict[str, Described]:
    """Format and shape of each packed weight by module path.

    Raises:
        CorruptFileError: a description that this version does not know; `where` names its file.
    """
    try:
        return {
            path: (described_format(entry["format"]), tuple(int(size) for size in entry["shape"]))
            for path, entry in weights.items()
        }
    except (UserError, TypeError, KeyError, ValueError, IndexError, AttributeError) as error:
        raise CorruptFileError(f"{where}: not a format of this version: {error}") from error


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / QUANTIZATION_FILE
    try:
        manifest = json.loads(path.read_bytes())
        if manifest["version"] != _VERSION:
            raise UserError(f"{path}: version {manifest['version']}, this program reads {_VERSION}")
        for entry in manifest["weights"].values():
            sizes = entry["shape"]
            if not (
                isinstance(entry["format"], dict)
                and len(sizes) in (2, 3)
                and math.prod(sizes) > 0
                and isinstance(entry["tensors"], list)
            ):
                raise ValueError(f"entry {entry}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(f"{path}: not a description of quantized weights: {error}") from error
    return manifest
