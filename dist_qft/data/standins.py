"""Stand-ins: unique words in place of all texts of messages. They show where a template writes each text.

A template may decide by a text's blanks and tags (`<think>`), so a stand-in keeps both and replaces only the text
between them. If the rendered stand-ins, with the real texts put back, are exactly the rendered conversation, then the
place of every text in it is known, however often the same words occur.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dist_qft.data.samples import REASONING, Message

# Letters and digits survive quoting, trimming and concatenation.
_WORD = "qz{salt}{number}Kj"
_TAG = re.compile(r"</?[A-Za-z_][\w:.-]*>|<\|[^<>|\s]+\|>|<\uff5c[^<>\uff5c]+\uff5c>|\[/?[A-Z_]+\]")
REASONING_KEYS = (REASONING, "thinking", "reasoning")  # the names under which templates look for reasoning


@dataclass(frozen=True)
class Piece:
    """A text without blanks around it that message `message` says.

    kind: content, reasoning, function (the name of a called one) or tool call (a text among its arguments).
    blanks: the blanks of an empty content, whose piece has no text.
    """

    message: int
    kind: str
    text: str
    blanks: str = ""

    def spellings(self) -> Iterable[str]:
        """The text as templates may write it: as it is, or escaped as in JSON or a Python literal."""
        yield self.text
        if not self.text:
            yield self.blanks
        for ensure_ascii in (False, True):
            yield json.dumps(self.text, ensure_ascii=ensure_ascii)[1:-1]
        yield repr(self.text)[1:-1]


class Occurrence(NamedTuple):
    """Characters start to end of the rendered text are the piece with that number."""

    piece: int
    start: int
    end: int


@dataclass(frozen=True)
class Choice:
    """The texts that get stand-ins: of all messages or the assistant's, names of called functions, empty answers."""

    assistant_only: bool
    names: bool
    empty: bool


# In the order in which they are tried: a template may decide by a function's name or an empty content.
CHOICES = (
    Choice(assistant_only=False, names=True, empty=True),
    Choice(assistant_only=False, names=False, empty=True),
    Choice(assistant_only=False, names=False, empty=False),
    Choice(assistant_only=True, names=False, empty=False),
)


@dataclass(frozen=True)
class StandIns:
    """Messages with stand-ins; the piece with number i stands behind the word with number i."""

    messages: list[Message]
    pieces: list[Piece]
    word: re.Pattern[str]

    def split(self, rendered: str) -> list[str]:
        """A text with stand-ins as [text, number, text, number, ..., text]."""
        return self.word.split(rendered)


def tags_in(template: str) -> re.Pattern[str] | None:
    """A pattern for the tags that the template's source names, and for their counterparts; None if it names none."""
    named = set(_TAG.findall(template))
    named |= {tag.replace("/", "", 1) if tag[1] == "/" else f"{tag[0]}/{tag[1:]}" for tag in named}
    tags = sorted(named, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, tags))})") if tags else None


def stand_in(messages: Sequence[Message], tags: re.Pattern[str] | None, choice: Choice) -> StandIns:
    """The messages, as a template takes them, with stand-ins in place of their texts."""
    salt = _salt(messages)
    pieces: list[Piece] = []

    def replaced(text: str, message: int, kind: str) -> str:
        parts = tags.split(text) if tags else [text]
        for i in range(0, len(parts), 2):  # between them stand the tags
            core = parts[i].strip()
            if core:
                before, _, after = parts[i].partition(core)
                parts[i] = before + new_word(Piece(message, kind, core)) + after
        return "".join(parts)

    def new_word(piece: Piece) -> str:
        pieces.append(piece)
        return _WORD.format(salt=salt, number=len(pieces) - 1)

    def message_with_stand_ins(message: Message, index: int) -> Message:
        changed = dict(message)
        reasoning = next((message[key] for key in REASONING_KEYS if isinstance(message.get(key), str)), None)
        if reasoning is not None:
            text = replaced(reasoning, index, "reasoning")
            changed |= {key: text for key in REASONING_KEYS if key in message}
        content = message.get("content")
        if isinstance(content, str):
            if content.strip() or not choice.empty or reasoning or message["role"] != "assistant" or _calls(message):
                changed["content"] = replaced(content, index, "content")
            else:
                changed["content"] = new_word(Piece(index, "content", "", content))
        elif isinstance(content, list):
            changed["content"] = [{**part, "text": replaced(part["text"], index, "content")} for part in content]
        if calls := _calls(message):
            changed["tool_calls"] = [call_with_stand_ins(call, index) for call in calls]
        return changed

    def call_with_stand_ins(call: dict[str, Any], index: int) -> dict[str, Any]:
        function = dict(call["function"])
        if choice.names:
            function["name"] = replaced(function["name"], index, "function")
        if "arguments" in function:
            function["arguments"] = value_with_stand_ins(function["arguments"], index)
        return {**call, "function": function}

    def value_with_stand_ins(value: Any, index: int) -> Any:
        if isinstance(value, str):
            return replaced(value, index, "tool call")
        if isinstance(value, dict):
            return {key: value_with_stand_ins(entry, index) for key, entry in value.items()}
        if isinstance(value, list):
            return [value_with_stand_ins(entry, index) for entry in value]
        return value

    changed = [
        message if choice.assistant_only and message["role"] != "assistant" else message_with_stand_ins(message, index)
        for index, message in enumerate(messages)
    ]
    return StandIns(changed, pieces, re.compile(_WORD.format(salt=salt, number=r"(\d+)")))


def _salt(messages: Sequence[Message]) -> str:
    """Letters that make the stand-ins' words differ from everything in the messages."""
    text, salt = json.dumps(messages, ensure_ascii=False, default=str), ""
    while f"qz{salt}" in text:
        salt += "x"
    return salt


def _calls(message: Message) -> list[dict[str, Any]]:
    return message.get("tool_calls") or []


def align(text: str, parts: Sequence[str], pieces: Sequence[Piece]) -> list[Occurrence] | None:
    """The places of the pieces in `text`, given its rendering with stand-ins, split; None if the two do not agree."""
    if not text.startswith(parts[0]):
        return None
    occurrences, position = [], len(parts[0])
    for number, literal in zip(parts[1::2], parts[2::2], strict=True):
        piece = int(number)
        for spelling in pieces[piece].spellings():
            end = position + len(spelling)
            if text.startswith(spelling, position) and text.startswith(literal, end):
                break
        else:
            return None
        occurrences.append(Occurrence(piece, position, end))
        position = end + len(literal)
    return occurrences if position == len(text) else None


def search(text: str, pieces: Sequence[Piece]) -> list[Occurrence]:
    """The places of the pieces in `text`, one after the other; those that are not found are left out."""
    occurrences, position = [], 0
    for number, piece in enumerate(pieces):
        for spelling in piece.spellings():
            if spelling and (start := text.find(spelling, position)) >= 0:
                position = start + len(spelling)
                occurrences.append(Occurrence(number, start, position))
                break
    return occurrences
