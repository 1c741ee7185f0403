"""The tokens that end an answer: those that config.json, generation_config.json and the tokenizer name."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file

from dist_qft.config.schema import ModelConfig

GENERATION_CONFIG = "generation_config.json"
_CONTENT = "an answer"


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
    return _distinct([config.get_text_config().eos_token_id, stored_generation_config(model).get("eos_token_id")])


def stop_ids(named: object, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids at which generation ends: `named` (an id, several or None), the tokenizer's eos and its template's turn end.

    A base model that was tuned on chats ends its turns with the template's token, which its own files need not name.
    """
    return _distinct([named, tokenizer.eos_token_id, turn_end_id(tokenizer)])


def turn_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template writes right after an assistant's content; None if there is none."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": _CONTENT}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # templates are free to refuse: then the files' own ids have to do
        return None
    if not isinstance(text, str) or _CONTENT not in text:
        return None
    ending = tokenizer(text.rpartition(_CONTENT)[2].lstrip(), add_special_tokens=False)["input_ids"]
    first = ending[0] if ending else None
    return first if first in set(tokenizer.all_special_ids) | _special_added(tokenizer) else None


def _special_added(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}


def _distinct(values: Iterable[object]) -> list[int]:
    """Ids out of ids, lists of them and None, each once, in order."""
    found: list[int] = []
    for value in values:
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, int) and not isinstance(item, bool) and item >= 0 and item not in found:
                found.append(item)
    return found
