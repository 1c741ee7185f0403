"""The rule by which the tokenizers of Mistral's later models split a text before they merge its bytes.

The tokenizer.json of Mistral Small 3.1 and 3.2, Magistral and Devstral has the rule of another family: it makes other
tokens of numbers and of words with capitals inside than the models were trained on. transformers tells the user to set
a flag, which replaces the rule of every model of these types, right or wrong. Here the wrong rule alone is replaced.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerBase

WRONG = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RIGHT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_MARK = ("[INST]", 3)  # a token and its id, in all of Mistral's vocabularies that split by this rule


def split_as_trained(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer of Mistral's the right rule if it has the wrong one. Llama 3 has that rule by right."""
    token, number = _MARK
    if tokenizer.is_fast and tokenizer.get_vocab().get(token) == number and _first_rule(tokenizer) == WRONG:
        tokenizer.backend_tokenizer.pre_tokenizer[0] = pre_tokenizers.Split(Regex(RIGHT), behavior="isolated")


def correct_file(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the right rule into a copy of the file that `tokenizer` was read from, if that has the wrong one."""
    if path.exists() and _first_rule(tokenizer) == RIGHT:
        text = path.read_text(encoding="utf-8")
        if (wrong := json.dumps(WRONG)) in text:
            path.write_text(text.replace(wrong, json.dumps(RIGHT)), encoding="utf-8")


@contextmanager
def no_advice_on_splits() -> Iterator[None]:
    """Context in which transformers does not ask for its flag."""
    logger = logging.getLogger("transformers.tokenization_utils_tokenizers")

    def other(record: logging.LogRecord) -> bool:
        return "fix_mistral_regex" not in record.getMessage()

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def _first_rule(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The pattern at which a text is split first; None if that is none."""
    if (rules := tokenizer.backend_tokenizer.pre_tokenizer) is None:
        return None
    state = json.loads(rules.__getstate__())
    first = (state.get("pretokenizers") or [{}])[0]
    return first["pattern"].get("Regex") if first.get("type") == "Split" else None
