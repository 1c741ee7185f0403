"""Choose the source that reads the files at `model.path`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_qft.base_model.bitsandbytes_folder import BitsAndBytesSource, is_nf4
from dist_qft.base_model.downloads import fetch_json, fetch_weights, snapshot_here
from dist_qft.base_model.gguf_file import GgufSource
from dist_qft.base_model.model_files import INDEX
from dist_qft.base_model.quantized_folder import METHOD, QUANTIZATION_FILE, QuantizedSource, is_quantized_folder
from dist_qft.base_model.quantized_weights import (
    READABLE,
    has_reader,
    open_packed_folder,
    quantization_settings,
)
from dist_qft.base_model.sources import SafetensorsSource, TensorSource
from dist_qft.config.schema import ModelConfig, QuantizationConfig
from dist_qft.errors import CorruptFileError, UserError

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf")
_MODELOPT_FILE = "hf_quant_config.json"


def open_source(model: ModelConfig) -> TensorSource:
    """The weights of `model.path`; a Hub id is downloaded to (or found in) the Hugging Face cache."""
    path = Path(model.path)
    if path.suffix == ".gguf":
        return GgufSource(path)
    folder = path if path.is_dir() else fetch_json(model)
    own, settings = is_quantized_folder(folder), quantization_settings(folder)
    if not own:
        _require_read_here(folder, settings)
    if not path.is_dir():
        fetch_weights(model, folder)
    if own:
        return QuantizedSource(folder)
    if settings is None:
        return SafetensorsSource(folder)
    return BitsAndBytesSource(folder) if is_nf4(settings) else open_packed_folder(folder, settings)


def has_weights(model: ModelConfig) -> bool:
    """True if the weights are on this machine under `model.path`, so that opening them downloads nothing."""
    path = Path(model.path)
    if path.suffix == ".gguf":
        return True
    # Weights of other kinds count: that they cannot be read shows when they are opened.
    return path.is_dir() and any(file.suffix in _WEIGHTS or file.name == INDEX for file in path.iterdir())


def local_source(model: ModelConfig) -> TensorSource | None:
    """The weights of `model.path`, unless they are floats that would have to be downloaded."""
    if has_weights(model):
        return open_source(model)
    source = quantized_source(model)
    folder = snapshot_here(model) if source is None and not Path(model.path).exists() else None
    return source if folder is None else open_source(model.model_copy(update={"path": str(folder), "revision": None}))


def require_readable(settings: Mapping[str, Any], where: str) -> None:
    """Refuse a `quantization_config` of weights that no reader knows."""
    if settings.get("quant_method") != METHOD and not is_nf4(settings) and not has_reader(settings):
        kind = settings.get("bnb_4bit_quant_type") if settings.get("load_in_4bit") else None
        words = " ".join(str(word) for word in (settings.get("quant_method", "a method without a name"), kind) if word)
        raise UserError(f"model.path: '{where}' is already quantized by {words}; must be {READABLE}")


def _require_read_here(folder: Path, settings: Mapping[str, Any] | None) -> None:
    """Refuse a folder by its JSON files, before its weights are fetched."""
    if settings is None:
        _refuse_unsaid_modelopt(folder)
    elif settings.get("quant_method") == METHOD:
        raise CorruptFileError(f"{folder}: config.json says {METHOD}, but there is no {QUANTIZATION_FILE}")
    else:
        require_readable(settings, str(folder))


def _refuse_unsaid_modelopt(folder: Path) -> None:
    """Refuse ModelOpt's weights if only a file of its own says that they are quantized, which transformers ignores."""
    try:
        found = json.loads((folder / _MODELOPT_FILE).read_bytes())["quantization"]["quant_algo"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if found:
        raise UserError(
            f"model.path: '{folder}' is quantized by ModelOpt ({found}), but only {_MODELOPT_FILE} says so; must be in "
            f'config.json, too: "quantization_config": {{"quant_method": "modelopt", "quant_algo": "{found}"}}'
        )


def quantized_source(model: ModelConfig) -> TensorSource | None:
    """The weights of `model.path` if its files may hold some of them quantized, else None.

    The weights of a Hub id are fetched if its config.json says that they are quantized.
    """
    path = Path(model.path)
    quantized = path.suffix == ".gguf" or is_quantized_folder(path)
    if not quantized and quantization_settings(model.path, model.revision) is None:
        return None
    return open_source(model)


def stored_quantization() -> QuantizationConfig:
    """The config section with which loading changes no weight of any model's files."""
    return QuantizationConfig(linear="stored", embedding="stored")
