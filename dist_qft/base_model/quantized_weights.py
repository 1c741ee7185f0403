"""Choose the reader of a folder that another program quantized, by its `quantization_config`."""

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from dist_qft.base_model.codebook_folder import compressed_fp4_weights, modelopt_fp4_weights, stacked_mxfp4_weights
from dist_qft.base_model.fp8_folder import fp8_weights
from dist_qft.base_model.int4_folder import auto_round_weights, awq_weights, compressed_int4_weights, gptq_weights
from dist_qft.base_model.packed_folder import PackedFolder, StoredWeight
from dist_qft.base_model.sources import SafetensorsSource
from dist_qft.errors import UserError

Settings = Mapping[str, Any]
READABLE = "16-bit or 32-bit weights, nf4 of bitsandbytes, int4 of GPTQ, AWQ, AutoRound or compressed-tensors, FP8, "
READABLE += "MXFP4 of gpt-oss, MXFP4 or NVFP4 of compressed-tensors, NVFP4 or FP8 of ModelOpt, or GGUF"


def _compressed(files: SafetensorsSource, settings: Settings) -> Iterable[StoredWeight]:
    """Folders of compressed-tensors may mix: each weight's own tensors say how it is stored."""
    for key in ("transform_config", "sparsity_config"):
        found = settings.get(key)
        if isinstance(found, Mapping) and (found.get("config_groups") or found.get("format", "dense") != "dense"):
            raise UserError(f"{files.where}: compressed-tensors with {key} is not supported")
    return chain(compressed_int4_weights(files), compressed_fp4_weights(files), fp8_weights(files, settings))


def _modelopt(files: SafetensorsSource, settings: Settings) -> Iterable[StoredWeight]:
    return chain(modelopt_fp4_weights(files), fp8_weights(files, settings))


_READERS: dict[str, Callable[[SafetensorsSource, Settings], Iterable[StoredWeight]]] = {
    "gptq": gptq_weights,
    "awq": awq_weights,
    "auto-round": auto_round_weights,
    "intel/auto-round": auto_round_weights,
    "compressed-tensors": _compressed,
    "fp8": fp8_weights,
    "modelopt": _modelopt,
    "mxfp4": stacked_mxfp4_weights,
}


def has_reader(settings: Settings) -> bool:
    """True if a config.json's `quantization_config` is of a method that is read here."""
    method = settings.get("quant_method")
    return isinstance(method, str) and method in _READERS


def quantization_settings(path: str | Path, revision: str | None = None) -> dict[str, Any] | None:
    """The `quantization_config` in the config.json of a folder or Hub id.

    Returns:
        None if it has none, or if there is no such file.
    """
    try:
        return _settings_in(PretrainedConfig.get_config_dict(str(path), revision=revision)[0])
    except (OSError, ValueError, TypeError, AttributeError):  # the last two: JSON, but not an object
        return None


def _settings_in(tree: Mapping[str, Any]) -> dict[str, Any] | None:
    """The `quantization_config` in the content of a config.json, its own or that of its text part; None without one."""
    text = tree.get("text_config")
    for part in (tree, text if isinstance(text, Mapping) else {}):
        if isinstance(found := part.get("quantization_config"), dict):
            return found
    return None


def open_packed_folder(folder: Path, settings: Settings) -> PackedFolder:
    """The weights of a folder whose quantization method has a reader."""
    files = SafetensorsSource(folder)
    stored = list(_READERS[settings["quant_method"]](files, settings))
    if not stored:
        raise UserError(f"{folder}: {_nothing_found(files, settings)}")
    return PackedFolder(folder, files, stored)


def _nothing_found(files: SafetensorsSource, settings: Settings) -> str:
    """The fault of a folder without a weight that its method's reader knows."""
    odd = next(
        (name for name in sorted(files.names()) if len(files.shape(name)) > 1 and not files.is_float(name)), None
    )
    if odd is None:
        return "config.json promises quantized weights, but none is stored in it"
    words = [settings[key] for key in ("quant_method", "format", "quant_algo") if isinstance(settings.get(key), str)]
    return f"tensor '{odd}' is {files.dtype(odd)} ({' '.join(words)}), which is not supported; must be {READABLE}"
