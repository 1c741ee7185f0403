"""What lies at `model.path`: which source reads it, and in which formats it holds its weights already."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_qft.base_model.bitsandbytes_folder import BitsAndBytesSource, is_bitsandbytes_folder
from dist_qft.base_model.gguf_file import GgufSource
from dist_qft.base_model.quantized_folder import QuantizedSource, is_quantized_folder
from dist_qft.base_model.sources import SafetensorsSource, TensorSource
from dist_qft.config.schema import ModelConfig, QuantizationConfig
from dist_qft.errors import UserError
from dist_qft.quant.frozen import FrozenWeight


def open_source(model: ModelConfig) -> TensorSource:
    """The weights of `model.path`; a Hub id is downloaded to (or found in) the Hugging Face cache."""
    path = Path(model.path)
    if path.suffix == ".gguf":
        return GgufSource(path)
    folder = path if path.is_dir() else _downloaded(model)
    return packed_source(folder) or SafetensorsSource(folder)


def packed_source(folder: Path) -> QuantizedSource | BitsAndBytesSource | None:
    """The weights of a folder that we or bitsandbytes quantized; None for any other."""
    if is_quantized_folder(folder):
        return QuantizedSource(folder)
    return BitsAndBytesSource(folder) if is_bitsandbytes_folder(folder) else None


def _downloaded(model: ModelConfig) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = ["*.safetensors", "*.json"]
        return Path(snapshot_download(model.path, revision=model.revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise UserError(f"model.path: cannot fetch '{model.path}' from the Hub: {error}") from error


def check_stored_formats(
    source: TensorSource, linears: Mapping[str, FrozenWeight], tables: Mapping[str, FrozenWeight]
) -> None:
    """Refuse to hold a quantized folder's weights in other formats than they have: it would quantize them twice."""
    if not isinstance(source, QuantizedSource | BitsAndBytesSource):
        return
    weights, free = {**linears, **tables}, set()
    if isinstance(source, BitsAndBytesSource):  # it leaves the tables as floats, for us to hold as the config says
        weights, free = dict(linears), {"embedding"}
        if packed := [path for path in tables if path in source.formats]:
            raise UserError(
                f"model.path: '{source.where}' holds {packed[0]} as nf4; embedding and LM head must be floats"
            )
    for path, weight in weights.items():
        wanted, found = weight.format.describe(), source.formats.get(path, {"name": "dense"})
        if wanted != found:
            section = source.section()
            keys = {"linear": section.linear} | section.model_dump(exclude_defaults=True, exclude=free)
            raise UserError(
                f"quantization: {path} would be {_words(wanted)}, but '{source.where}' holds it as {_words(found)}; "
                f"set the section to {json.dumps(keys)}"
            )


def stored_quantization(path: Path) -> QuantizationConfig:
    """The formats in which a model's files hold it, so that loading changes no weight.

    `path` is a folder that we or bitsandbytes quantized, a GGUF file (Q4_1 and Q8_0 stay packed, all else is dense), or
    a Hugging Face folder.
    """
    if path.suffix == ".gguf":
        return _gguf_section(GgufSource(path))
    source = packed_source(path)
    return QuantizationConfig(linear="dense", embedding="dense") if source is None else source.section()


def _gguf_section(source: GgufSource) -> QuantizationConfig:
    tables = [name for name in source.names() if name.endswith(("embed_tokens.weight", "lm_head.weight"))]
    embedding = "q8_0" if all(source.kind(name) == "Q8_0" for name in tables) else "dense"
    linears = {n for n in source.names() if n.endswith("_proj.weight")}
    exempt = sorted(name.removesuffix(".weight") for name in linears if source.kind(name) != "Q4_1")
    if len(exempt) == len(linears):
        return QuantizationConfig(linear="dense", embedding=embedding)
    return QuantizationConfig(linear="affine4", block=[1, 32], embedding=embedding, exempt=exempt)


def _words(format: Mapping[str, Any]) -> str:
    parts = (
        key.replace("_", " ") if value is True else str(value) for key, value in format.items() if value is not False
    )
    return " ".join(parts)
