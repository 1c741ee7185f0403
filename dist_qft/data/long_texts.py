"""Texts many times longer than a row of tokens. Of these the beginning alone is tokenized.

A tokenizer takes about fifty bytes for each character of a text, 5 GB for one of 100 MB. What a row of `max_length`
tokens keeps of it stands in the first few kilobytes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dist_qft.data.samples import Conversation

_CHARACTERS = 2**17  # so many, or so many for each token of a row, are always tokenized whole
_PER_TOKEN = 24
_MOST = 32  # times as many at most: in a conversation, which a template cannot render in part, or of an odd text
_PROBE = 263  # characters by which a second beginning is shorter; a prime, so that repetitions do not fit

Tokens = tuple[list[int], np.ndarray]  # token ids and their (n, 2) character offsets


def ordinary_characters(max_length: int) -> int:
    """Characters up to which every text is tokenized whole for rows of `max_length` tokens."""
    return max(_CHARACTERS, _PER_TOKEN * max_length)


def most_characters(max_length: int) -> int:
    """Characters of the longest conversation that is rendered, and of the longest beginning that is tokenized."""
    return _MOST * ordinary_characters(max_length)


def beginning(parts: Sequence[str], length: int) -> str:
    """The first `length` characters of texts that stand one behind the other."""
    taken: list[str] = []
    for part in parts:
        taken.append(part[:length])
        length -= len(taken[-1])
    return "".join(taken)


def tokens_of_beginning(texts: Sequence[str], max_length: int, tokenize: Callable[[str], Tokens]) -> Tokens | None:
    """The first tokens, more than `max_length`, of texts that stand one behind the other.

    The last tokens of a beginning may be others in the whole text. Therefore its first half is taken, and only if a
    somewhat shorter beginning has the same. None if no beginning of `most_characters` has, or so many tokens.
    """
    length = ordinary_characters(max_length)
    while length <= most_characters(max_length):
        text = beginning(texts, length)
        ids, offsets = tokenize(text)
        kept = len(ids) // 2
        if kept > max_length and tokenize(text[:-_PROBE])[0][:kept] == ids[:kept]:
            return ids[:kept], offsets[:kept]
        length *= 4
    return None


def characters_of(conversation: Conversation) -> int:
    """The number of characters of all texts in a conversation and its tools."""
    return _characters(conversation.messages) + _characters(conversation.tools)


def _characters(value: Any) -> int:
    match value:
        case str():
            return len(value)
        case dict():
            return sum(len(key) + _characters(entry) for key, entry in value.items())
        case list():
            return sum(map(_characters, value))
    return 0
