"""Renderings of conversations with stand-ins in place of their texts: one for all that differ in their texts only."""

import json
import re
from collections.abc import Sequence
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
    for this message. after: by message, the tail of a rendering that ends with this message. conversation: the messages
    with their stand-ins, and the tools. word: the pattern of stand-ins.
    """

    parts: list[str]
    conversation: tuple[list[Message], list[Tool] | None]
    word: re.Pattern[str]
    before: dict[int, Tail] = field(default_factory=dict)
    after: dict[int, Tail] = field(default_factory=dict)
    unasked: dict[int, Tail | None] = field(default_factory=dict)
    headers: dict[int, str] = field(default_factory=dict)


class Shapes:
    """The shapes of one template's conversations. tails: shapes have `before` and `after`."""

    def __init__(self, template: ChatTemplate, tails: bool) -> None:
        self._template = template
        self._tails = tails
        self._shape = lru_cache(CACHED_SHAPES)(self._render)

    def find(self, messages: Sequence[Message], tools: Sequence[Tool] | None, word: re.Pattern[str]) -> Shape | None:
        """The shape of messages that have stand-ins already; None if the template refuses them."""
        return self._shape(json.dumps([messages, tools], ensure_ascii=False, default=str), word)

    def _render(self, key: str, word: re.Pattern[str]) -> Shape | None:
        messages, tools = json.loads(key)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        requests = [Request(messages, tools)]
        if self._tails:
            requests += [Request(messages[:i], tools, prompt=True) for i in answers if i > 0]
            requests += [Request(messages[: i + 1], tools) for i in answers]
        whole, *others = self._template.render(requests)
        if whole.error is not None:
            return None
        shape = Shape(word.split(whole.text), (messages, tools), word)
        if self._tails:
            befores = [i for i in answers if i > 0]
            for tails, indices, renderings in (
                (shape.before, befores, others[: len(befores)]),
                (shape.after, answers, others[len(befores) :]),
            ):
                for index, rendering in zip(indices, renderings, strict=True):
                    if rendering.error is None:
                        tails[index] = _tail(word.split(rendering.text))
        return shape

    def unasked(self, shape: Shape, message: int) -> Tail | None:
        """The tail of a rendering of the messages before this one, without a prompt; None if they are refused."""
        if message not in shape.unasked:
            messages, tools = shape.conversation
            (rendered,) = self._template.render([Request(messages[:message], tools)])
            shape.unasked[message] = None if rendered.error else _tail(shape.word.split(rendered.text))
        return shape.unasked[message]

    def header(self, shape: Shape, message: int, messages: Sequence[Message], tools: Sequence[Tool] | None) -> str:
        """The generation prompt alone: the text that it adds to a rendering of the messages before."""
        if message not in shape.headers:
            without, with_prompt = self._template.render(
                [Request(messages[:message], tools, prompt) for prompt in (False, True)]
            )
            gained = with_prompt.text.startswith(without.text) and not (without.error or with_prompt.error)
            shape.headers[message] = with_prompt.text[len(without.text) :] if gained else ""
        return shape.headers[message]

    def closing(
        self, shape: Shape | None, message: int, messages: Sequence[Message], tools: Sequence[Tool] | None
    ) -> str:
        """The end of a rendering that ends with this message: of stand-ins, or where there are none of the texts."""
        if shape is None:
            return self._template.render([Request(messages[: message + 1], tools)])[0].text
        if message not in shape.after:
            (rendered,) = self._template.render([Request(shape.conversation[0][: message + 1], shape.conversation[1])])
            shape.after[message] = _tail(shape.word.split(rendered.text))
        return shape.after[message].text


def _tail(parts: list[str]) -> Tail:
    return Tail(int(parts[-2]) if len(parts) > 1 else None, parts[-1])
