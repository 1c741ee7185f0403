"""The form in which messages are given to a template: templates differ in the forms that they take.

Some take the arguments of a call as JSON text, some walk lists of content parts, some know no system role. A
conversation is given in the usual form first. If the template refuses it or leaves something out, the forms that may
mend this are tried. The choice depends on the conversation and the template alone, never on earlier rows.
"""

import json
import reprlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from dist_qft.data.chat_template import ChatTemplate, Request
from dist_qft.data.samples import REASONING, WEIGHT, Conversation, Message
from dist_qft.data.spans import Located, SpanFinder, TemplateRefusal
from dist_qft.data.standins import REASONING_KEYS, Piece
from dist_qft.errors import UserError

FOLDED = "the chat template has no system role; the system message is put before the first user message"


@dataclass(frozen=True)
class Form:
    """repairs: "parts" gives contents as lists of parts, "arguments" those of calls as JSON text, "system" the system
    message as the start of the first user message, "null" no content to calls without a text."""

    repairs: frozenset[str] = frozenset()

    def apply(self, messages: Sequence[Message], knows_developer: bool) -> tuple[list[Message], int]:
        """The messages as the template takes them, without keys of ours, and how many at the start were folded."""
        taken = [self._message(message, knows_developer) for message in messages]
        folded = system_length(taken) if "system" in self.repairs else 0
        if folded:
            texts = [message["content"] for message in taken[: folded + 1]]
            taken = [{**taken[folded], "content": "\n\n".join(texts)}, *taken[folded + 1 :]]
        if "null" in self.repairs:
            taken = [
                {**message, "content": message["content"] or None} if message.get("tool_calls") else message
                for message in taken
            ]
        if "parts" in self.repairs:
            taken = [{**message, "content": _as_parts(message["content"])} for message in taken]
        return taken, folded

    def spelled_out(self, messages: Sequence[Message], text: str) -> bool:
        """True if a template took the content parts of `apply` for text, and wrote them with braces and quotes."""
        return "parts" in self.repairs and any(
            spelling in text
            for message in messages
            for part in message["content"] or ()
            for spelling in (repr(part), json.dumps(part), json.dumps(part, ensure_ascii=False))
        )

    def _message(self, message: Message, knows_developer: bool) -> Message:
        changed = {key: value for key, value in message.items() if key != WEIGHT and value is not None}
        changed.setdefault("content", "")
        if changed["role"] == "developer" and not knows_developer:
            changed["role"] = "system"
        reasoning = next((changed[key] for key in REASONING_KEYS if key in changed), None)
        if reasoning is not None:
            changed = {"thinking": reasoning, "reasoning": reasoning, **changed, REASONING: reasoning}
        if changed.get("tool_calls"):
            changed["tool_calls"] = [self._call(call) for call in changed["tool_calls"]]
        return changed

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        arguments, as_text = call["function"].get("arguments"), "arguments" in self.repairs
        if isinstance(arguments, str) and not as_text:
            arguments = json.loads(arguments)
        elif isinstance(arguments, dict) and as_text:
            arguments = json.dumps(arguments, ensure_ascii=False)
        else:
            return call
        return {**call, "function": {**call["function"], "arguments": arguments}}


def _as_parts(content: str | None) -> list[dict[str, str]] | None:
    return None if content is None else [{"type": "text", "text": content}]


def system_length(messages: Sequence[Message]) -> int:
    """The number of system messages at the start that a user message follows; 0 if none does."""
    roles = [message["role"] for message in messages]
    length = next((i for i, role in enumerate(roles) if role != "system"), 0)
    return length if roles[length : length + 1] == ["user"] else 0


def locate(conversation: Conversation, finder: SpanFinder, wanted: set[int], checked: Collection[int]) -> Located:
    """The rendered conversation and the places of the `wanted` assistant messages in it.

    checked: the messages that must be in the text; `missing` lists texts that are not in it, of tools, too. All message
    numbers are those of `conversation`.

    Raises:
        TemplateRefusal: no form of the conversation can be rendered, or the places cannot be told.
        UserError: the template took too long.
    """
    usual = _attempt(Form(), conversation, finder, wanted, checked)
    if isinstance(usual, Located) and not usual.missing:
        if not any(_ends_twice(usual, number, conversation, finder.end_markers) for number in wanted):
            return usual
        bare = _attempt(Form(frozenset({"null"})), conversation, finder, wanted, checked)
        shorter = isinstance(bare, Located) and not bare.missing and len(bare.text) < len(usual.text)
        return bare if isinstance(bare, Located) and shorter else usual
    best = usual
    for form in _repaired(usual, conversation):
        attempt = _attempt(form, conversation, finder, wanted, checked)
        if isinstance(attempt, Located):
            if not attempt.missing:
                return attempt
            if isinstance(best, TemplateRefusal) or len(attempt.missing) < len(best.missing):
                best = attempt
    if isinstance(best, TemplateRefusal):
        raise best
    return best


def _ends_twice(located: Located, number: int, conversation: Conversation, ends: tuple[str, ...]) -> bool:
    """True if a template writes a message's calls, and its empty content as an answer of its own."""
    message, spans = conversation.messages[number], located.spans.get(number)
    if not spans or not message.get("tool_calls") or message.get("content"):
        return False
    said = located.text[spans[0][0] : spans[-1][1]]
    return any(said.endswith(end) and said.count(end) > 1 for end in ends)


def prompt_text(conversation: Conversation, template: ChatTemplate, *, prompt: bool = True) -> str:
    """The conversation as text, with the header of the answer to come if `prompt`.

    Raises:
        UserError: no form of the conversation can be rendered with all that is asked, or the template took too long.
    """
    reason, forms = "", [Form()]
    for form in forms:
        messages, _ = form.apply(conversation.messages, "developer" in template.source)
        rendered = template.render(Request(messages, conversation.tools, prompt))
        if form.spelled_out(messages, rendered.text):
            continue
        missing = None if rendered.error else _left_out(rendered.text, form, conversation, template, prompt)
        if rendered.error is None and missing is None:
            return rendered.text
        if not reason:
            reason = rendered.error or f"it leaves out {reprlib.repr(missing)}"
            forms += _repaired(TemplateRefusal(reason), conversation)
    raise UserError(f"model.path: the chat template refuses the conversation: {reason}")


def _left_out(text: str, form: Form, conversation: Conversation, template: ChatTemplate, prompt: bool) -> str | None:
    """A text that the model is asked and the template does not write, or None; answers may lose their reasoning.

    A template may also take a part of a text for a switch, such as /no_think, and write the rest.
    """
    for number, message in enumerate(conversation.messages):
        asked = str(message["content"] or "")
        if message["role"] == "assistant" or asked.strip() in text:
            continue
        others = [*conversation.messages]
        others[number] = {**message, "content": ""}
        messages, _ = form.apply(others, "developer" in template.source)
        without = template.render(Request(messages, conversation.tools, prompt))
        if without.error is not None or without.text == text:
            return asked
    return None


def _repaired(failure: Located | TemplateRefusal, conversation: Conversation) -> Iterator[Form]:
    """Forms that may mend the failure, those that change least first."""
    messages = conversation.messages
    may_fold = system_length([{"role": _system_role(message)} for message in messages]) > 0
    has_calls = any(message.get("tool_calls") for message in messages)
    if isinstance(failure, TemplateRefusal):
        repairs = ["arguments"] * has_calls + ["parts"] + ["system"] * may_fold
    else:
        roles = {messages[piece.message]["role"] for piece in failure.missing if piece.kind == "content"}
        repairs = ["parts"] * bool(roles) + ["system"] * (may_fold and roles == {"system"})
        repairs += ["null"] * any(piece.kind in ("function", "tool call") for piece in failure.missing)
    for size in range(1, len(repairs) + 1):
        yield from (Form(frozenset(chosen)) for chosen in combinations(repairs, size))


def _system_role(message: Message) -> str:
    return "system" if message["role"] == "developer" else message["role"]


def _attempt(
    form: Form, conversation: Conversation, finder: SpanFinder, wanted: set[int], checked: Collection[int]
) -> Located | TemplateRefusal:
    messages, folded = form.apply(conversation.messages, "developer" in finder.template.source)
    try:
        found = finder.locate(messages, conversation.tools, {message - folded for message in wanted})
    except TemplateRefusal as refusal:
        return refusal
    if form.spelled_out(messages, found.text):
        return TemplateRefusal("the chat template writes lists of content parts as Python or JSON does")
    spans = {message + folded: spans for message, spans in found.spans.items()}
    missing = [Piece(piece.message + folded, piece.kind, piece.text) for piece in found.missing]
    missing = [piece for piece in missing if piece.message in checked]
    for number, message in enumerate(conversation.messages):
        if number in checked and message.get("tool_calls"):
            said = "".join(found.text[start:end] for start, end in spans.get(number, [(0, len(found.text))]))
            missing += [Piece(number, "tool call", text) for text in _unsaid(message["tool_calls"], said)]
    offered = [tool["function"]["name"] for tool in conversation.tools or []]
    missing += [Piece(-1, "tool", name) for name in offered if name not in found.text]
    notes = found.notes | ({FOLDED} if folded else set())
    return Located(found.text, spans, missing, notes)


def _unsaid(calls: Sequence[dict[str, Any]], said: str) -> Iterator[str]:
    """Names, keys and numbers of calls that are not in the text. Texts are found by stand-ins already."""
    for call in calls:
        arguments = call["function"].get("arguments")
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        for text in (call["function"]["name"], *_keys_and_scalars(arguments)):
            spellings = [*Piece(0, "", text).spellings(), _PYTHON.get(text, text)]
            if not any(spelling in said for spelling in spellings):
                yield text


_PYTHON = {"true": "True", "false": "False", "null": "None"}


def _keys_and_scalars(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, entry in value.items():
            yield key
            yield from _keys_and_scalars(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _keys_and_scalars(entry)
    elif not isinstance(value, str):
        yield json.dumps(value)
