"""The end of a turn: how much of the text behind an answer belongs to it, such as the token that ends it."""

import re
from collections.abc import Iterable, Sequence


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
        if self._has_words(closing[common:]) and not self._has_marker(rest[:common]) and self._has_marker(rest):
            return len("".join(self._split_at_markers.split(rest, maxsplit=1)[:2]))  # text that is written otherwise
        return common

    def first(self, rest: str) -> str:
        """The token of the tokenizer's own that `rest` begins with, with the blanks before it; "" if there is none."""
        return rest[: self._first_marker(rest)]

    def may_have_trailer(self, closing: str) -> bool:
        """True if the text has more than one token of the tokenizer's own, or words behind it, or no token at all."""
        return bool("".join(self._split_at_markers.split(closing, maxsplit=1)[2:] or closing).strip())

    def without_trailer(self, closing: str, asked: str, unasked: str, gap: str) -> str:
        """`closing` without what the template writes behind every conversation: its own words, or a prompt.

        asked, unasked: the text behind the last piece of the messages before this one, with and without a prompt for
        it. gap: the text there in the conversation itself.
        """
        header = asked.removeprefix(unasked) if asked.startswith(unasked) else None
        begun = header is not None and gap.startswith(unasked) and not self._has_words(header)
        if header == "" or begun:  # a prompt, or its beginning, may stand behind every conversation
            return self._without_prompt(closing, unasked, always=header == "", alone=gap.strip() == unasked.strip())
        if gap.startswith(unasked):
            return closing
        trailer = unasked[self._common_start(gap, unasked) :]
        if not self._has_words(trailer) or not closing.endswith(trailer):
            return closing
        closing = closing.removesuffix(trailer)
        # The token that begins every header may stand before the trailer's own words.
        opening = self._split_at_markers.split(header or "")[1:2]
        return closing.removesuffix(opening[0]) if opening else closing

    def _without_prompt(self, closing: str, unasked: str, always: bool, alone: bool) -> str:
        """`closing` without the prompt that stands behind every conversation.

        always: `unasked` has the whole prompt, and not its beginning. alone: nothing else stands before the answer.
        """
        mine, theirs = self._split_at_markers.split(closing), self._split_at_markers.split(unasked)
        stripped = ([part.strip() for part in reversed(parts)] for parts in (mine, theirs))
        start = len(mine) - _same_start(*stripped)
        own, trailer = "".join(mine[:start]), "".join(mine[start:])
        end = self._first_marker(trailer)
        # Words or two tokens may end every turn; then an answer's header stands behind them.
        in_words = always and bool(end) and self._has_words(trailer[end:])
        if not in_words and not (always and alone) and len(mine) - start <= 5:
            return closing
        end = end or len(trailer) - len(trailer.lstrip())
        return own + trailer[:end] if trailer[end:].strip() else closing

    def is_header(self, rest: str, length: int, header: str, gap: str) -> bool:
        """True if the first `length` characters of `rest` are a token that begins the next message.

        header: as for `length_before_another`. gap: the text in front of the answer, behind another message.
        """
        token = rest[:length].strip()
        if token not in self._markers or not header or self._begins_with(gap, token):  # it ends other messages, too
            return False
        return not self.length_before_another(rest, header)

    def _begins_with(self, gap: str, token: str) -> bool:
        """True if a token is the first thing in a text but for blanks and marks, such as the quote that ends JSON."""
        before, *found = self._split_at_markers.split(gap, maxsplit=1)
        return found[:1] == [token] and not re.search(r"\w", before)

    def common_end(self, rest: str, gap: str, text: str) -> int:
        """The length of the start of `rest` up to a token that ends this message and the one before it; 0 if none does.

        gap: the text in front of the answer. text: the whole text; a token that it begins with begins messages.
        """
        length = self._first_marker(rest)
        token = rest[:length].strip()
        return length if token and token not in self._openers(text) and gap.lstrip().startswith(token) else 0

    def closers(self, text: str, places: Iterable[int]) -> set[str]:
        """The tokens that come right behind these places in the text, ends of what others than the assistant say.

        A token that the text begins with begins messages, and is none of them.
        """
        found = {text[place : place + self._first_marker(text[place:])].strip() for place in places}
        return found - {"", *self._openers(text)}

    def _openers(self, text: str) -> tuple[str, ...]:
        """The token that a text begins with, and the next one if nothing stands between, as behind BOS."""
        blank, first, between, second = (*self._split_at_markers.split(text, maxsplit=2), "", "", "")[:4]
        if blank.strip():
            return ()
        return (first,) if between.strip() else (first, second)

    def length_before_another(self, rest: str, header: str) -> int:
        """The length of the start of `rest` up to the token that ends a turn, where a turn ends if another one follows.

        header: the text in front of a message like the next one, at a place where no answer stands before it. A token
        of the tokenizer's own that `rest` has besides is the answer's end.
        """
        mine, theirs = self._split_at_markers.split(rest), self._split_at_markers.split(header)
        while mine and theirs and mine[-1].strip() == theirs[-1].strip():
            mine.pop()
            theirs.pop()
        return self._first_marker("".join(mine)) if header else 0

    def _first_marker(self, rest: str) -> int:
        """The length of the start of `rest` up to the end of a token of the tokenizer's own; 0 if text comes first."""
        blank, *parts = self._split_at_markers.split(rest, maxsplit=1)
        return len(blank) + len(parts[0]) if parts and not blank.strip() else 0

    def _has_marker(self, text: str) -> bool:
        return len(self._split_at_markers.split(text)) > 1

    def _has_words(self, text: str) -> bool:
        return any(part.strip() for part in self._split_at_markers.split(text)[::2])

    def _common_start(self, one: str, other: str) -> int:
        """The length of the common start of two texts, without a part of one of the tokenizer's own tokens."""
        length = 0
        for mine, theirs in zip(self._split_at_markers.split(one), self._split_at_markers.split(other), strict=False):
            if mine != theirs:
                is_marker = mine in self._markers or theirs in self._markers
                return length + (0 if is_marker else _same_start(mine, theirs))
            length += len(mine)
        return length


def _same_start(one: Sequence[str], other: Sequence[str]) -> int:
    """The number of items, or characters, with which both begin."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
