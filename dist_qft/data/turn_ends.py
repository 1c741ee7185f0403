"""The end of a turn: how much of the text behind an answer belongs to it, such as the token that ends it."""

import re
from collections.abc import Sequence


class TurnEnds:
    """The ends of turns, with the tokenizer's added tokens, one of which usually ends a turn."""

    def __init__(self, markers: Sequence[str]) -> None:
        self._markers = frozenset(markers)
        self._split_at_markers = re.compile(f"({'|'.join(map(re.escape, sorted(markers, key=len, reverse=True)))})")

    def length(self, rest: str, closing: str | None) -> int:
        """The length of the text behind a message's last piece that belongs to it, such as the end-of-turn token.

        closing: the text that ends a conversation with this message. Where other messages follow, the template may end
        the turn in another way, and text that it puts at the very end of every conversation is missing.
        """
        if closing is None:
            return self._first_marker(rest)
        if rest.startswith(closing):
            return len(closing)
        common = self._common_start(rest, closing)
        if self._first_marker(closing) and not self._first_marker(rest[:common]):
            return self._first_marker(rest)
        return common

    def length_before_another(self, rest: str, header: str) -> int:
        """The length of the start of `rest` up to the token that ends a turn, where a turn ends if another one follows.

        header: the text in front of a message like the next one, at a place where no answer stands before it. A token
        of the tokenizer's own that `rest` has besides is the answer's end.
        """
        mine, theirs = self._split_at_markers.split(rest), self._split_at_markers.split(header)
        while mine and theirs and mine[-1] == theirs[-1]:
            mine.pop()
            theirs.pop()
        return self._first_marker("".join(mine)) if header else 0

    def _first_marker(self, rest: str) -> int:
        """The length of the start of `rest` up to the end of a token of the tokenizer's own; 0 if text comes first."""
        blank, *parts = self._split_at_markers.split(rest, maxsplit=1)
        return len(blank) + len(parts[0]) if parts and not blank.strip() else 0

    def _common_start(self, one: str, other: str) -> int:
        """The length of the common start of two texts, without a part of one of the tokenizer's own tokens."""
        length = 0
        for mine, theirs in zip(self._split_at_markers.split(one), self._split_at_markers.split(other), strict=False):
            if mine != theirs:
                is_marker = mine in self._markers or theirs in self._markers
                return length + (0 if is_marker else _same_characters(mine, theirs))
            length += len(mine)
        return length


def _same_characters(one: str, other: str) -> int:
    """The number of characters with which both texts begin."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
