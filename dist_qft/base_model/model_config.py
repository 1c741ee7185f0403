"""The configuration of a model: read without running code of the model's folder, and checked before anything is built.

A `config.json` decides how many modules are built and how large they are, and it comes from elsewhere. Its sizes are
therefore bounded here first, and an exception of the library about the rest becomes one line (`library_refusal`).
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.utils import logging as transformers_logging

from dist_qft.base_model.gguf_config import check_sizes, complete_config
from dist_qft.base_model.gguf_header import read_header
from dist_qft.base_model.gguf_metadata import quick_metadata
from dist_qft.base_model.weight_files import require_readable
from dist_qft.config.schema import ModelConfig
from dist_qft.errors import DistQFTError, UserError
from dist_qft.storage.reach import require_reachable

# Sizes of the text decoder under the names that the families give them: smallest and largest value.
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
_WIDTHS = ("hidden_size", "intermediate_size", "n_embd", "d_model", "vocab_size", "head_dim")
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_LARGEST_WIDTH = 1 << 24
_BOUNDS = {**dict.fromkeys(_DEPTHS, (1, 1000)), **dict.fromkeys(_WIDTHS + _HEADS, (1, _LARGEST_WIDTH))}
# Everything else that sizes something, whatever its prefix, in every part of the file.
_UPPER_BOUNDS = (
    (re.compile("(^|_)layers?$"), 1000),
    (re.compile("experts"), 1 << 16),
    (re.compile("(_size|dim|heads|_rank|_inner|_kernel|_groups|channels)$"), _LARGEST_WIDTH),
    (re.compile("(position|ctx|length|window)"), (1 << 31) - 1),
)
_LONGEST_REASON = 300


def read_model_config(model: ModelConfig) -> tuple[PretrainedConfig, bool]:
    """The model's configuration and whether it comes from a GGUF file. Reads headers only.

    Raises:
        UserError: no such path, no config.json, a model type that transformers does not know or that needs code of its
            own, sizes that no model has, or weights that are quantized in a way that cannot be read.
        SetupError: it is in a folder that this user may not enter.
    """
    path = Path(model.path)
    require_reachable(path, "model.path")
    if path.suffix == ".gguf":
        return _gguf_config(path), True
    if path.exists() and not (path / "config.json").is_file():
        raise UserError(f"model.path: '{path}' has no config.json; must be a Hugging Face folder or a .gguf file")
    if not path.exists() and (model.path.count("/") != 1 or model.path.startswith((".", "/", "~"))):
        raise UserError(f"model.path: no such file or folder '{model.path}', and it is not a Hub id (owner/name)")
    with library_refusal(f"model.path: cannot read the configuration of '{model.path}'"):
        tree, _ = PretrainedConfig.get_config_dict(model.path, revision=model.revision)
        _check_tree(tree, model.path)
        # False, not the default, which is to ask on the terminal.
        config = AutoConfig.from_pretrained(model.path, trust_remote_code=False, revision=model.revision)
        return _without_quantization(config, model.path), False


def _gguf_config(path: Path) -> PretrainedConfig:
    """The configuration in a GGUF file's metadata, whose sizes are checked first."""
    if not path.is_file():
        raise UserError(f"model.path: no file '{path}'")
    header = read_header(path)
    check_sizes(header)
    with library_refusal(f"model.path: cannot read the configuration of '{path}'"), quick_metadata():
        config = AutoConfig.from_pretrained(str(path.parent), gguf_file=header.files[0].name)
        return complete_config(config, header)


@contextmanager
def library_refusal(place: str) -> Iterator[None]:
    """Context in which an exception of the library that reads or builds a model becomes a UserError of one line.

    Which exception a bad configuration causes depends on the family's code: a wrong head count may be a
    ZeroDivisionError in one and a RuntimeError of torch in another. Transformers' own log lines are held back.
    """
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    except DistQFTError:
        raise
    except Exception as error:
        raise UserError(f"{place}: {one_line(error)}") from error
    finally:
        transformers_logging.set_verbosity(level)


def one_line(error: Exception) -> str:
    """An exception's message in one line of bounded length; with its type where the text alone says little."""
    text = " ".join(str(error).split())
    if not isinstance(error, ValueError | OSError | ImportError) or not text:
        text = f"{type(error).__name__}: {text}".rstrip(": ")
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 3] + "..."


def _check_tree(tree: Mapping[str, Any], path: str) -> None:
    """Refuse a config.json that needs code of its own, and sizes that would take forever, or all memory, to build."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = tree.get("model_type")
    if not isinstance(kind, str):
        raise UserError(f"model.path: '{path}': config.json has no model_type")
    if tree.get("auto_map") and kind not in CONFIG_MAPPING:
        raise UserError(
            f"model.path: '{path}': model type '{kind}' needs Python code from the model's own folder, which is never "
            "run here; must be a model type that transformers itself has"
        )
    text = tree.get("text_config")
    for part in (tree, text if isinstance(text, dict) else {}):
        for key, (low, high) in _BOUNDS.items():
            _require_bounds(part.get(key), low, high, key, path)
        if "kv_lora_rank" not in part:  # latent attention has keys and values for every head
            _require_shared_heads(part.get("num_attention_heads"), part.get("num_key_value_heads"), path)
    for key, value in _numbers(tree):
        for pattern, high in _UPPER_BOUNDS:
            if pattern.search(key.rpartition(".")[2]):
                _require_bounds(value, -high, high, key, path)


def _require_bounds(value: object, low: int, high: int, key: str, path: str) -> None:
    if isinstance(value, int) and not low <= value <= high:
        raise UserError(f"model.path: '{path}': config.json {key}: got {value}, must be {low:,} to {high:,}")


def _require_shared_heads(heads: object, key_value_heads: object, path: str) -> None:
    if isinstance(heads, int) and isinstance(key_value_heads, int) and heads % key_value_heads:
        raise UserError(
            f"model.path: '{path}': config.json num_key_value_heads: got {key_value_heads}, must divide "
            f"num_attention_heads {heads}"
        )


def _numbers(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, int]]:
    """Every integer of a nested configuration with its dotted key."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            yield from ((f"{prefix}{key}", entry) for entry in value if isinstance(entry, int))
        elif isinstance(value, int):
            yield f"{prefix}{key}", value


def _without_quantization(config: PretrainedConfig, path: str) -> PretrainedConfig:
    """The configuration of the same model as floats: in which formats its files hold it is for the sources to say."""
    for part in (config, config.get_text_config()):
        found = getattr(part, "quantization_config", None)
        if found is not None:
            settings = found if isinstance(found, Mapping) else found.to_dict()
            require_readable(settings, path)
            del part.quantization_config
    return config
