"""The characters of a rendered conversation that the assistant writes, and a check that everything said is there.

All places are found in the one text that is trained on: by the template's `{% generation %}` blocks if it has them,
else by stand-ins (`standins`). No rendering of fewer messages has to be a prefix of it. Templates that write a turn in
one way while it is the last and in another when turns follow are therefore no problem.
"""

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from dist_qft.data.chat_template import ChatTemplate, Request
from dist_qft.data.opening import opening_length
from dist_qft.data.samples import Message, Tool
from dist_qft.data.standins import CHOICES, Choice, Occurrence, Piece, align, search, stand_in, tags_in
from dist_qft.data.turn_ends import TurnEnds

Span = tuple[int, int]  # characters [start, end) of the rendered text

CACHED_SHAPES = 1024
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class TemplateRefusal(Exception):
    """A conversation cannot be rendered, or the assistant's part in it cannot be found."""


class Tail(NamedTuple):
    """The end of a rendering: the number of its last stand-in (None: it has none) and the text after that."""

    number: int | None
    text: str


@dataclass(frozen=True)
class Shape:
    """The rendering of conversations that differ in their texts only.

    parts: the rendering with stand-ins, split. before: by message, the tail of a rendering that ends with the prompt
    for this message. after: by message, the tail of a rendering that ends with this message.
    """

    parts: list[str]
    before: dict[int, Tail]
    after: dict[int, Tail]
    headers: dict[int, str] = field(default_factory=dict)


@dataclass
class Located:
    """A rendered conversation.

    spans: by assistant message, the characters it writes, from behind its header to its end-of-turn token.
    missing: texts of messages that are not in the rendered text, or not inside its author's `{% generation %}` blocks.
    notes: remarks on the trained part, for the user.
    """

    text: str
    spans: dict[int, list[Span]]
    missing: list[Piece]
    notes: set[str]


class SpanFinder:
    """A finder of the assistant's part in conversations, which it renders with one template.

    end_markers: the tokenizer's added tokens, one of which usually ends a turn.
    """

    def __init__(self, template: ChatTemplate, end_markers: tuple[str, ...]) -> None:
        self.template = template
        self.marked = _GENERATION.search(template.source) is not None
        self.end_markers = end_markers
        self._tags = tags_in(template.source)
        self._ends = TurnEnds(end_markers)
        self._shape = lru_cache(CACHED_SHAPES)(self._render_shape)

    def locate(self, messages: Sequence[Message], tools: Sequence[Tool] | None, wanted: set[int]) -> Located:
        """The text, and where the assistant messages `wanted` are in it.

        Raises:
            TemplateRefusal: the template refuses the conversation, or the places cannot be told.
            UserError: the template took too long.
        """
        rendered = self.template.render([Request(messages, tools)])[0]
        if rendered.error is not None:
            raise TemplateRefusal(f"the chat template refuses the conversation: {rendered.error}")
        text = rendered.text
        found: tuple[list[Piece], list[Occurrence], Shape | None] | None = None
        for choice in CHOICES:
            found = self._align(text, messages, tools, choice)
            if found is not None:
                break
        else:
            # The template changes the texts. If its author marked the assistant's part, their place is told still.
            if wanted and not self.marked:
                raise TemplateRefusal(
                    "the chat template changes what the messages say, so the assistant's tokens cannot be told"
                )
            pieces = stand_in(messages, self._tags, CHOICES[0]).pieces
            found = pieces, search(text, pieces), None
        pieces, occurrences, shape = found
        present = {occurrence.piece for occurrence in occurrences}
        missing = [piece for number, piece in enumerate(pieces) if number not in present and piece.text]
        located = Located(text, {}, missing, set())
        if self.marked:
            answers = {i for i, message in enumerate(messages) if message["role"] == "assistant"}
            _assign_marks(located, rendered.marked, pieces, occurrences, wanted, answers)
        elif wanted:
            assert shape is not None
            for message in sorted(wanted):
                span = self._span(located, message, (messages, tools), pieces, occurrences, shape)
                located.spans[message] = [span]
        return located

    def _align(
        self, text: str, messages: Sequence[Message], tools: Sequence[Tool] | None, choice: Choice
    ) -> tuple[list[Piece], list[Occurrence], Shape] | None:
        changed = stand_in(messages, self._tags, choice)
        key = json.dumps([changed.messages, tools], ensure_ascii=False, default=str)
        shape = self._shape(key, changed.word)
        occurrences = None if shape is None else align(text, shape.parts, changed.pieces)
        return None if occurrences is None or shape is None else (changed.pieces, occurrences, shape)

    def _render_shape(self, key: str, word: re.Pattern[str]) -> Shape | None:
        """The shape of a conversation that has stand-ins already, given as JSON; None if the template refuses it."""
        messages, tools = json.loads(key)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        requests = [Request(messages, tools)]
        if not self.marked:
            requests += [Request(messages[:i], tools, prompt=True) for i in answers if i > 0]
            requests += [Request(messages[: i + 1], tools) for i in answers]
        whole, *others = self.template.render(requests)
        if whole.error is not None:
            return None
        shape = Shape(word.split(whole.text), {}, {})
        if not self.marked:
            befores = [i for i in answers if i > 0]
            for tails, indices, renderings in (
                (shape.before, befores, others[: len(befores)]),
                (shape.after, answers, others[len(befores) :]),
            ):
                for index, rendering in zip(indices, renderings, strict=True):
                    if rendering.error is None:
                        tails[index] = _tail(word.split(rendering.text))
        return shape

    def _span(
        self,
        located: Located,
        message: int,
        conversation: tuple[Sequence[Message], Sequence[Tool] | None],
        pieces: Sequence[Piece],
        occurrences: Sequence[Occurrence],
        shape: Shape,
    ) -> Span:
        """The characters that an assistant message writes, in a text where the places of all pieces are known."""
        text = located.text
        owners = _owners(pieces, occurrences)
        places = [i for i, owner in enumerate(owners) if owner == message]
        if places and len(places) != places[-1] - places[0] + 1:
            raise TemplateRefusal(f"the chat template mixes message {message} with others")
        # A message without any text lies behind the last piece of the messages before it.
        first = places[0] if places else sum(owner < message for owner in owners)
        behind = places[-1] + 1 if places else first
        previous = occurrences[first - 1] if first else None
        low = previous.end if previous else 0
        high = occurrences[behind].start if behind < len(occurrences) else len(text)
        gap = text[low : occurrences[first].start if places else high]

        before, after = shape.before.get(message), shape.after.get(message)
        prompt = before.text if before and before.number == (previous.piece if previous else None) else None
        opening = opening_length(gap, prompt, located.notes)
        if opening is None:
            header = self._header(message, conversation, shape)
            at = gap.rfind(header) if header.strip() else -1
            if at < 0:
                raise TemplateRefusal(
                    f"the chat template does not show where message {message} begins; must be one with "
                    "{% generation %} blocks, or data.loss_on: all"
                )
            opening = at + len(header)
        start = low + opening

        closing = after.text if after and places and after.number == occurrences[behind - 1].piece else None
        if not places and after and prompt is not None and after.text.startswith(prompt):
            closing = after.text.removeprefix(prompt)
        last = occurrences[behind - 1].end if places else start
        length = self._ends.length(text[last:high], closing)
        if closing is not None and not closing.strip():
            if behind < len(occurrences):
                header = _header_before(text, behind, conversation[0], pieces, occurrences)
                length = max(length, self._ends.length_before_another(text[last:high], header))
            else:
                located.notes.add(
                    "the chat template writes nothing behind a conversation's last answer, so these do not teach the "
                    "model to stop"
                )
        end = last + length
        # Templates put a line break behind the end-of-turn token, where nobody generates any more.
        turn = text[start:end].rstrip()
        if turn.endswith(self.end_markers):
            end = start + len(turn)
        return start, end

    def _header(self, message: int, conversation: tuple[Sequence[Message], Sequence[Tool] | None], shape: Shape) -> str:
        """The generation prompt alone: the text that it adds to a rendering of the messages before."""
        if message not in shape.headers:
            messages, tools = conversation
            without, with_prompt = self.template.render(
                [Request(messages[:message], tools, prompt) for prompt in (False, True)]
            )
            gained = with_prompt.text.startswith(without.text) and not (without.error or with_prompt.error)
            shape.headers[message] = with_prompt.text[len(without.text) :] if gained else ""
        return shape.headers[message]


def _header_before(
    text: str,
    number: int,
    messages: Sequence[Message],
    pieces: Sequence[Piece],
    occurrences: Sequence[Occurrence],
) -> str:
    """The text in front of the first message that has the role of the one at an occurrence; empty if that is it."""
    roles = [messages[pieces[found.piece].message]["role"] for found in occurrences]
    first = roles.index(roles[number])
    return text[occurrences[first - 1].end if first else 0 : occurrences[first].start] if first < number else ""


def _owners(pieces: Sequence[Piece], occurrences: Sequence[Occurrence]) -> list[int]:
    """The message that each occurrence belongs to; -1 where a function's name comes again in its result's header."""
    owners: list[int] = []
    named: set[int] = set()
    for found in occurrences:
        piece = pieces[found.piece]
        owners.append(-1 if found.piece in named else piece.message)
        if piece.kind == "function":
            named.add(found.piece)
    return owners


def _tail(parts: list[str]) -> Tail:
    return Tail(int(parts[-2]) if len(parts) > 1 else None, parts[-1])


def _assign_marks(
    located: Located,
    marks: Sequence[Span],
    pieces: Sequence[Piece],
    occurrences: Sequence[Occurrence],
    wanted: set[int],
    answers: set[int],
) -> None:
    """Give each block that the template's author marked to the message whose pieces it holds, or that it stands at."""
    outside = {number for number, piece in enumerate(pieces) if piece.message in wanted and piece.text}
    for start, end in marks:
        inside = {found.piece for found in occurrences if start <= found.start and found.end <= end}
        outside -= inside
        owners = {pieces[number].message for number in inside}
        if owners & wanted and owners - wanted:
            raise TemplateRefusal("a {% generation %} block of the chat template holds messages that are not trained")
        if not owners and wanted:  # an empty answer, or an end token that is marked by itself
            owners = {min(wanted)} if wanted == answers else _beside(start, pieces, occurrences, answers)
        for message in owners & wanted:
            located.spans.setdefault(message, []).append((start, end))
    located.missing += [pieces[number] for number in sorted(outside) if pieces[number] not in located.missing]


def _beside(
    place: int, pieces: Sequence[Piece], occurrences: Sequence[Occurrence], answers: Collection[int]
) -> set[int]:
    """The answer that ends before a place in the text or, behind another's message, begins after it."""
    owners = _owners(pieces, occurrences)
    number = sum(found.end <= place for found in occurrences)
    return set([owner for owner in (*owners[:number][-1:], *owners[number:][:1]) if owner in answers][:1])
