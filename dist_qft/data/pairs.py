"""Records of a prompt and one or two answers to it, in the forms that TRL's trainers read.

Prompt and answers are texts, or lists of messages (or JSON text of such, as tables keep them). A pair may do without a
prompt of its own: then the answers begin with it, and it is what both have in common.
"""

from dist_qft.data.fields import Fields
from dist_qft.data.labels import verdict
from dist_qft.data.messages import read_conversation, read_messages
from dist_qft.data.records import RowError
from dist_qft.data.samples import Conversation, Message, Preference, PromptCompletion, Rated

# What data sets call a pair's question, the likeliest first.
_QUESTIONS = ("instruction", "question", "query", "user", "problem", "input", "conversations", "conversation")


def read_prompt(
    fields: Fields, answer: str = "completion", *, last_turn: bool = False
) -> PromptCompletion | Conversation:
    """A prompt and the answer in the field `answer`: two texts, or two lists of messages.

    A text beside a list is a message of its own. An answer may begin with its prompt once more, or
    with the end of it. last_turn: of messages that hold a text prompt the answer is what follows the last question.

    Raises:
        RowError: the answer begins with another prompt than the field `prompt`, which is a text.
    """
    is_text = not fields.holds_messages("prompt")
    if is_text and not fields.holds_messages(answer):
        _refuse_system(fields)
        return PromptCompletion(fields.text("prompt"), fields.text(answer))
    asked, answered = _messages(fields, "prompt", "user"), _messages(fields, answer, "assistant")
    start = next((i for i, message in enumerate(answered) if message["role"] == "assistant"), len(answered))
    if start and is_text and (last_turn or answered[:1] != asked):
        # As in UltraFeedback: the text is the question, which the messages hold as well.
        if not _asks(answered, fields.text("prompt")):
            raise fields.fault(answer, "begins with another question than the prompt")
        last = len(answered) - next(i for i, each in enumerate(reversed(answered)) if each["role"] == "user")
        return read_conversation(fields, answered, last)
    if answered[: len(asked)] == asked:
        return read_conversation(fields, answered, len(asked))
    if repeated := _same_turns(asked, answered):
        return read_conversation(fields, [*asked, *answered[repeated:]], len(asked))
    return read_conversation(fields, [*asked, *answered], len(asked))


def read_pair(fields: Fields) -> Preference:
    """The pair of a record, with its own prompt or with the one that both answers begin with.

    Raises:
        RowError: the answers are equal, or have no prompt in common, or the question seems to be another field.
    """
    chosen, rejected = fields.require("chosen"), fields.require("rejected")
    if chosen == rejected:
        raise fields.fault("rejected", "is the same as the chosen answer, which prefers nothing")
    if fields.get("prompt") is not None:
        return _pair_with_prompt(fields)
    are_messages = fields.holds_messages("chosen")
    if are_messages != fields.holds_messages("rejected"):
        raise fields.fault("rejected", "must be a text or a list of messages, as the chosen answer is")
    if are_messages:
        better, worse = read_messages(fields, "chosen"), read_messages(fields, "rejected")
        start = _common_messages(better, worse)
        if not start:
            raise _no_prompt(fields)
        return Preference(read_conversation(fields, better, start), read_conversation(fields, worse, start))
    better_text, worse_text = fields.text("chosen"), fields.text("rejected")
    start = _common_text(better_text, worse_text)
    if not start or _question(fields, better_text[:start]):
        raise _no_prompt(fields)
    _refuse_system(fields)
    return Preference(_split(better_text, start), _split(worse_text, start))


def read_rated(fields: Fields) -> Rated:
    """An answer with its verdict, `label`: true or false.

    Raises:
        RowError: the verdict is something else.
    """
    desirable = verdict(fields.require("label"))
    if desirable is None:
        raise fields.fault("label", "must be true or false")
    return Rated(read_prompt(fields, last_turn=True), desirable)


def _pair_with_prompt(fields: Fields) -> Preference:
    if not fields.holds_messages("prompt") and all(fields.holds_messages(field) for field in ("chosen", "rejected")):
        better, worse = read_messages(fields, "chosen"), read_messages(fields, "rejected")
        start = _common_messages(better, worse)
        if _asks(better[:start], fields.text("prompt")):  # the turns behind it that both have are prompt, too
            return Preference(read_conversation(fields, better, start), read_conversation(fields, worse, start))
    return Preference(read_prompt(fields, "chosen"), read_prompt(fields, "rejected"))


def _asks(messages: list[Message], question: str) -> bool:
    return question.strip() in [message["content"].strip() for message in messages if message["role"] == "user"]


def _messages(fields: Fields, field: str, role: str) -> list[Message]:
    if fields.holds_messages(field):
        return read_messages(fields, field)
    return [{"role": role, "content": fields.text(field)}]


def _same_turns(asked: list[Message], answered: list[Message]) -> int:
    """The number of messages at the start of an answer, the question first, with which the prompt ends."""
    if answered[0]["role"] == "assistant":
        return 0
    lengths = range(min(len(asked), len(answered) - 1), 0, -1)
    return next((length for length in lengths if asked[-length:] == answered[:length]), 0)


def _question(fields: Fields, prompt: str = "") -> str | None:
    """The field that holds a question which the answers do not begin with; None if there is none."""
    for name in _QUESTIONS:
        value = fields.record.get(name)
        if value and (not isinstance(value, str) or value.strip() not in prompt):
            return name
    return None


def _no_prompt(fields: Fields) -> RowError:
    if (question := _question(fields)) is not None:
        reason = "does not hold the prompt, which seems to be the field"
        return fields.fault("chosen", f"{reason} {question!r}; set columns: {{prompt: {question}}}")
    return fields.fault("chosen", "has no prompt in common with the rejected answer; must begin with it")


def _refuse_system(fields: Fields) -> None:
    if fields.get("system"):
        raise fields.fault("system", "has no place beside a text prompt; must be in the prompt, or beside messages")


def _common_messages(first: list[Message], second: list[Message]) -> int:
    """The number of messages at the start that are the same; of two equal lists all but the last."""
    pairs = zip(first, second, strict=False)
    count = next((index for index, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))
    return min(count, len(first) - 1, len(second) - 1)


def _common_text(first: str, second: str) -> int:
    """The length of the text that both begin with, without a blank before the first difference, as TRL cuts it."""
    shorter = min(len(first), len(second))
    length = next((index for index in range(shorter) if first[index] != second[index]), shorter)
    return length - 1 if length and first[length - 1] == " " else length


def _split(text: str, start: int) -> PromptCompletion:
    return PromptCompletion(text[:start], text[start:])
