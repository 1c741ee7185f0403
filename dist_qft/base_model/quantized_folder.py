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

from dist_qft.base_model.sources import GgufSource, Rows, SafetensorsSource
from dist_qft.config.schema import QuantizationConfig
from dist_qft.errors import CorruptFileError, UserError
from dist_qft.quant.contract import Format
from dist_qft.quant.frozen import FrozenWeight

QUANTIZATION_FILE = "quantization.json"
WEIGHTS_NAME = "packed"
_VERSION = 1


def is_quantized_folder(path: Path) -> bool:
    return (path / QUANTIZATION_FILE).is_file()


class QuantizedSource:
    """The packed tensors of such a folder; a packed weight goes by the name `<module path>.weight`."""

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        self._weights = _manifest(folder)["weights"]
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

    def read_packed(self, name: str, format: Format, rows: Rows = None) -> dict[str, Tensor] | None:
        path = name.removesuffix(".weight")
        entry = self._weights.get(path)
        if entry is None or entry["format"] != format.describe():
            return None
        first, stop = rows or (0, entry["shape"][0])
        packed = {}
        for key in format.packed_shapes(tuple(entry["shape"])):
            per_entry = format.rows_per_entry(key)
            span = None if per_entry is None else (first // per_entry, stop // per_entry)
            packed[key] = self._files.read(f"{path}.{key}", span)
        return packed


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


def check_stored_formats(folder: Path, weights: Mapping[str, FrozenWeight]) -> None:
    """Refuse to hold a quantized folder's weights in other formats than they have: it would quantize them twice."""
    if not is_quantized_folder(folder):
        return
    stored = _manifest(folder)["weights"]
    for path, weight in weights.items():
        wanted, found = weight.format.describe(), stored.get(path, {"format": {"name": "dense"}})["format"]
        if wanted != found:
            section = stored_quantization(folder).model_dump(exclude_defaults=True)
            raise UserError(
                f"quantization: {path} would be {_words(wanted)}, but '{folder}' holds it as {_words(found)}; "
                f"set the section to {json.dumps(section)}"
            )


def stored_quantization(path: Path) -> QuantizationConfig:
    """The formats in which a model's files hold it, so that loading changes no weight.

    `path` is a quantized folder, a GGUF file (Q4_1 and Q8_0 stay packed, all else is dense), or a Hugging Face folder.
    """
    if is_quantized_folder(path):
        try:
            return QuantizationConfig.model_validate(_manifest(path)["quantization"])
        except ValidationError as error:
            raise CorruptFileError(f"{path / QUANTIZATION_FILE}: not a quantization section: {error}") from error
    if path.suffix != ".gguf":
        return QuantizationConfig(linear="dense", embedding="dense")
    source = GgufSource(path)
    tables = [name for name in source.names() if name.endswith(("embed_tokens.weight", "lm_head.weight"))]
    embedding = "q8_0" if all(source.kind(name) == "Q8_0" for name in tables) else "dense"
    linears = {n for n in source.names() if n.endswith("_proj.weight")}
    exempt = sorted(name.removesuffix(".weight") for name in linears if source.kind(name) != "Q4_1")
    if len(exempt) == len(linears):
        return QuantizationConfig(linear="dense", embedding=embedding)
    return QuantizationConfig(linear="affine4", block=[1, 32], embedding=embedding, exempt=exempt)


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


def _words(format: Mapping[str, Any]) -> str:
    return " ".join(str(value) for value in format.values() if value is not False)
