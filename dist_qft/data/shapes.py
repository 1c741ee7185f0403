"""Renderings of conversations with stand-ins in place of their texts: one for all that differ in their texts only."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from dist_qft.data.chat_template import ChatTemplate, Request
from dist_qft.data.samples import Message, Tool

CACHED_SHAPES = 1024


class Tail(NamedTuple):
    """The end of a rendering: the number of its last stand-in (None: it has none) and the text after that."""

    number: int | None
    text: str


@dataclass(frozen=True)
class Shape:
    """The rendering of conversations that differ in their texts only.

    parts: the rendering with stand-ins, split. before: by message, the tail of a rendering that ends with the prompt
    for this message; None if it is refused. after: by message, the tail of a rendering that ends with this message. The
    tails are of the messages that were asked for. conversation: the messages with their stand-ins, and the tools.
    word: the pattern of stand-ins.
    """

    parts: list[str]
    conversation: tuple[list[Message], list[Tool] | None]
    word: re.Pattern[str]
    before: dict[int, Tail | None] = field(default_factory=dict)
    after: dict[int, Tail | None] = field(default_factory=dict)
    unasked: dict[int, Tail | None] = field(default_factory=dict)
    headers: dict[int, str] = field(default_factory=dict)


class Shapes:
    """The shapes of one template's conversations."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._shape = lru_cache(CACHED_SHAPES)(self._render)

    def find(self, messages: Sequence[Message], tools: Sequence[Tool] | None, word: re.Pattern[str]) -> Shape | None:
        """The shape of messages that have stand-ins already; None if the template refuses them."""
        return self._shape(json.dumps([messages, tools], ensure_ascii=False, default=str), word)

    def _render(self, key: str, word: re.Pattern[str]) -> Shape | None:
        messages, tools = json.loads(key)
        whole = self._template.render(Request(messages, tools))
        return None if whole.error is not None else Shape(word.split(whole.text), (messages, tools), word)

    def add_tails(self, shape: Shape, wanted: Iterable[int]) -> None:
        """Fill `before` and `after` for these messages alone: each tail costs a rendering of all that stands before."""
        messages, tools = shape.conversation
        for message in wanted:
            if message > 0 and message not in shape.before:
                shape.before[message] = self._rendered_tail(shape, Request(messages[:message], tools, prompt=True))
            if message not in shape.after:
                shape.after[message] = self._rendered_tail(shape, Request(messages[: message + 1], tools))

    def _rendered_tail(self, shape: Shape, request: Request) -> Tail | None:
        rendered = self._template.render(request)
        return None if rendered.error is not None else _tail(shape.word.split(rendered.text))

    def unasked(self, shape: Shape, message: int) -> Tail | None:
        """The tail of a rendering of the messages before this one, without a prompt; None if they are refused."""
        if message not in shape.unasked:
            messages, tools = shape.conversation
            shape.unasked[message] = self._rendered_tail(shape, Request(messages[:message], tools))
        return shape.unasked[message]

    def header(self, shape: Shape, message: int, messages: Sequence[Message], tools: Sequence[Tool] | None) -> str:
        """The generation prompt alone: the text that it adds to a rendering of the messages before."""
        if message not in shape.headers:
            without, with_prompt = (
                self._template.render(Request(messages[:message], tools, prompt)) for prompt in (False, True)
            )
            gained = with_prompt.text.startswith(without.text) and not (without.error or with_prompt.error)
            shape.headers[message] = with_prompt.text[len(without.text) :] if gained else ""
        return shape.headers[message]

    def closing(
        self, shape: Shape | None, message: int, messages: Sequence[Message], tools: Sequence[Tool] | None
    ) -> str:
        """The end of a rendering that ends with this message: of stand-ins, or where there are none of the texts."""
        if shape is None:
            return self._template.render(Request(messages[: message + 1], tools)).text
        if message not in shape.after:
            told, offered = shape.conversation
            shape.after[message] = self._rendered_tail(shape, Request(told[: message + 1], offered))
        tail = shape.after[message]
        return tail.text if tail is not None else ""


def _tail(parts: list[str]) -> Tail:
    return Tail(int(parts[-2]) if len(parts) > 1 else None, parts[-1])
