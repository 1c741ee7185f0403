"""The tokens that end a text, as config.json and generation_config.json name them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from transformers.utils import cached_file

from dist_qft.config.schema import ModelConfig

GENERATION_CONFIG = "generation_config.json"


def stored_generation_config(model: ModelConfig) -> dict[str, Any]:
    """The content of the base's generation_config.json; {} if there is none or it cannot be read."""
    if model.path.endswith(".gguf"):
        return {}
    try:
        path = Path(model.path)
        if path.is_dir():
            found = path / GENERATION_CONFIG
        else:
            cached = cached_file(
                model.path, GENERATION_CONFIG, revision=model.revision, _raise_exceptions_for_missing_entries=False
            )
            if cached is None:
                return {}
            found = Path(cached)
        content = json.loads(found.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def eos_ids(model: ModelConfig, config: PretrainedConfig) -> list[int]:
    """Ids that the base's own files call the end of a text, config.json's first."""
    named = [getattr(part, "eos_token_id", None) for part in (config.get_text_config(), config)]
    return distinct_ids([*named, stored_generation_config(model).get("eos_token_id")])


def distinct_ids(values: Iterable[object]) -> list[int]:
    """Ids out of ids, lists of them and None, each once, in order."""
    found: list[int] = []
    for value in values:
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, int) and not isinstance(item, bool) and item >= 0 and item not in found:
                found.append(item)
    return found
