"""The characters of a rendered conversation that the assistant writes, and a check that everything said is there.

All places are found in the one text that is trained on: by the template's `{% generation %}` blocks if it has them,
else by stand-ins (`standins`). No rendering of fewer messages has to be a prefix of it. Templates that write a turn in
one way while it is the last and in another when turns follow are therefore no problem.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from dist_qft.data.chat_template import ChatTemplate, Request
from dist_qft.data.opening import opening_length
from dist_qft.data.samples import Message, Tool
from dist_qft.data.shapes import Shape, Shapes
from dist_qft.data.standins import CHOICES, Choice, Occurrence, Piece, align, search, stand_in, tags_in
from dist_qft.data.turn_ends import TurnEnds

Span = tuple[int, int]  # characters [start, end) of the rendered text

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_OPEN = "the chat template writes nothing behind a conversation's last answer, so these do not teach the model to stop"
_OUTSIDE = "the chat template's {% generation %} blocks leave out the token that ends a turn; it is trained, too"


class TemplateRefusal(Exception):
    """A conversation cannot be rendered, or the assistant's part in it cannot be found."""


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
        self._shapes = Shapes(template)

    def locate(self, messages: Sequence[Message], tools: Sequence[Tool] | None, wanted: set[int]) -> Located:
        """The text, and where the assistant messages `wanted` are in it.

        Raises:
            TemplateRefusal: the template refuses the conversation, or the places cannot be told.
            UserError: the template took too long.
        """
        rendered = self.template.render(Request(messages, tools))
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
            others = (found for found in occurrences if messages[pieces[found.piece].message]["role"] != "assistant")
            closers = self._ends.closers(text, [found.end for found in others])
            for message in sorted(wanted & located.spans.keys()):
                self._end_marked(located, message, (messages, tools), occurrences, shape, closers)
        elif wanted:
            assert shape is not None
            self._shapes.add_tails(shape, sorted(wanted))
            for message in sorted(wanted):
                span = self._span(located, message, (messages, tools), pieces, occurrences, shape)
                located.spans[message] = [span]
        return located

    def _align(
        self, text: str, messages: Sequence[Message], tools: Sequence[Tool] | None, choice: Choice
    ) -> tuple[list[Piece], list[Occurrence], Shape] | None:
        changed = stand_in(messages, self._tags, choice)
        shape = self._shapes.find(changed.messages, tools, changed.word)
        occurrences = None if shape is None else align(text, shape.parts, changed.pieces)
        return None if occurrences is None or shape is None else (changed.pieces, occurrences, shape)

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
            # Some prompts begin with a line break that finished answers have not in front of their header.
            header = self._shapes.header(shape, message, *conversation).lstrip()
            at = gap.rfind(header) if header else -1
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
        elif closing is not None and prompt is not None and self._ends.may_have_trailer(closing):
            unasked = self._shapes.unasked(shape, message)
            if before and unasked and unasked.number == before.number:
                closing = self._ends.without_trailer(closing, prompt, unasked.text, gap)
        last = occurrences[behind - 1].end if places else start
        following = (
            _header_before(text, behind, conversation[0], pieces, occurrences) if behind < len(occurrences) else None
        )
        end = last + self._end_length(text, (last, high), closing, following, gap, located.notes)
        # Templates put a line break behind the end-of-turn token, where nobody generates any more.
        turn = text[start:end].rstrip()
        if turn.endswith(self.end_markers):
            end = start + len(turn)
        return start, end

    def _end_marked(
        self,
        located: Located,
        message: int,
        conversation: tuple[Sequence[Message], Sequence[Tool] | None],
        occurrences: Sequence[Occurrence],
        shape: Shape | None,
        closers: Collection[str],
    ) -> None:
        """Take in the token that ends an answer's turn where the author's blocks end in front of it.

        closers: the tokens that end what others than the assistant say.
        """
        text, (messages, tools) = located.text, conversation
        (first, _), (start, end) = located.spans[message][0], located.spans[message][-1]
        block = text[start:end].rstrip()
        # A block may end in a token that ends no turn, such as the one behind a call.
        ended = block.endswith(self.end_markers)
        if ended and block.endswith(tuple(closers)):
            return
        behind = min((found.start for found in occurrences if found.start >= end), default=len(text))
        token = self._ends.first(text[end:behind])
        gap = text[_end_before(text, first, messages[:message], occurrences) : first].lstrip()
        if ended and (token.strip() not in closers or text[:first].rstrip().endswith(token.strip())):
            return
        if token and message < len(messages) - 1:
            # It may begin the next turn: a conversation that ends with this answer does not have it then.
            closing = self._shapes.closing(shape, message, messages, tools)
            token = token if token.strip() in closing else ""
        # A token in front of answers begins turns, unless it ends the message before.
        known = token.strip() in closers or self._ends.common_end(token, gap, text)
        if token and (token.strip() not in gap or known):
            located.spans[message][-1] = (start, end + len(token))
            located.notes.add(_OUTSIDE)
            return
        if ended:
            return
        said = max((found.end for found in occurrences if start <= found.start and found.end <= end), default=start)
        followed = message + 1 < len(messages) and messages[message + 1]["role"] == "assistant"
        if not followed and not text[said:end].strip():  # words may end a turn as well
            located.notes.add(_OPEN)

    def _end_length(
        self, text: str, behind: Span, closing: str | None, following: str | None, gap: str, notes: set[str]
    ) -> int:
        """The length of the text behind an answer's last piece that belongs to it.

        behind: the characters up to the next piece. closing: the text that ends a conversation with the answer.
        following: None if it is the last message, else the text in front of the first message that has the role of the
        next one. gap: the text in front of the answer.
        """
        rest = text[slice(*behind)]
        length = self._ends.length(rest, closing)
        if closing is not None and not closing.strip():
            if following is not None:
                before_another = self._ends.length_before_another(rest, following)
                return max(length, before_another or self._ends.common_end(rest, gap, text))
            notes.add(_OPEN)
        elif closing and following and not rest.startswith(closing):
            return 0 if self._ends.is_header(rest, length, following, gap) else length
        return length


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


def _end_before(text: str, place: int, messages: Sequence[Message], occurrences: Sequence[Occurrence]) -> int:
    """The end of the last thing said before a place in the text, which may be a text that got no stand-in."""
    said = str(messages[-1]["content"] or "").strip() if messages else ""
    written = text.rfind(said, 0, place)
    return max(
        written + len(said) if written > 0 else 0, *(found.end for found in occurrences if found.end <= place), 0
    )


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
            owners = _beside(start, pieces, occurrences, answers) or ({min(wanted)} if wanted == answers else set())
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
