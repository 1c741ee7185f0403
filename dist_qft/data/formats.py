"""What a record's fields mean: from a record of one of seven known formats to a sample.

    alpaca             instruction, output [input, system, history: list of [question, answer]]
    sharegpt           conversations: list of {from, value} [system, tools]
    messages           messages: list of {role, content} [tools]
    prompt-completion  prompt, completion: plain text, no chat template
    text               text
    tokenized          input_ids [labels: the same ids, or -100 where nothing is to be predicted]
    classification     text, label [text_pair]; for the tasks that predict labels, and those alone

`columns` in the config maps these field names to the data's own. No tokenizer here: see `tokens`.
"""

import json
import reprlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from dist_qft.config.schema import DatasetConfig
from dist_qft.data.records import LocatedRecord, Record
from dist_qft.data.samples import Conversation, Labelled, PromptCompletion, Sample, Text, Tokenized
from dist_qft.errors import UserError

IGNORE_INDEX = -100  # the label that PyTorch's cross entropy and Hugging Face skip


class FormatFields(NamedTuple):
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


FORMATS = {
    "alpaca": FormatFields(("instruction", "output"), ("input", "system", "history")),
    "sharegpt": FormatFields(("conversations",), ("system", "tools")),
    "messages": FormatFields(("messages",), ("tools",)),
    "prompt-completion": FormatFields(("prompt", "completion")),
    "text": FormatFields(("text",)),
    "tokenized": FormatFields(("input_ids",), ("labels", "attention_mask")),
    "classification": FormatFields(("text", "label"), ("text_pair",)),
}
_NEVER_GUESSED = "classification"  # a text beside a label is also just a text: the task decides
ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


def resolve_format(dataset: DatasetConfig, first: LocatedRecord, key: str) -> str:
    """The format of `dataset`, for `auto` the only one whose required fields the first record has.

    Also checks that `columns` names fields of that format. `key` is the config section, for messages.
    """
    record, where = first
    name = dataset.format
    if name == "auto":
        fits = [
            format_name
            for format_name, fields in FORMATS.items()
            if format_name != _NEVER_GUESSED
            and all(dataset.columns.get(field, field) in record for field in fields.required)
        ]
        if len(fits) > 1:
            raise UserError(f"{where}: the fields {_names(record)} fit {' and '.join(fits)}; set {key}.format")
        if not fits:
            guessed = [format_name for format_name in FORMATS if format_name != _NEVER_GUESSED]
            needs = "; ".join(f"{format_name}: {', '.join(FORMATS[format_name].required)}" for format_name in guessed)
            raise UserError(f"{where}: the fields {_names(record)} fit no format ({needs}); set {key}.columns")
        name = fits[0]
    known = FORMATS[name].required + FORMATS[name].optional
    for field in dataset.columns:
        if field not in known:
            raise UserError(f"{key}.columns: {name} has no field {field!r}; allowed: {', '.join(known)}")
    return name


def to_sample(record: Record, format_name: str, columns: Mapping[str, str], where: str) -> Sample:
    """Interprets one record; UserError naming `where`, the field and the fields at hand if it does not fit."""
    fields = _Fields(record, columns, where)
    match format_name:
        case "alpaca":
            return _from_alpaca(fields)
        case "sharegpt":
            return _from_sharegpt(fields)
        case "messages":
            messages = [_to_message(fields, entry, i) for i, entry in enumerate(fields.objects("messages"))]
            return Conversation(messages, _tools(fields))
        case "prompt-completion":
            return PromptCompletion(fields.text("prompt"), fields.text("completion"))
        case "text":
            return Text(fields.text("text"))
        case "tokenized":
            return _from_tokenized(fields)
        case "classification":
            pair = fields.text("text_pair") if fields.get("text_pair") is not None else None
            return Labelled(fields.text("text"), pair, fields.require("label"))
    raise ValueError(f"unknown format {format_name!r}")


class _Fields:
    """A record's fields under our names, each checked when it is taken."""

    def __init__(self, record: Record, columns: Mapping[str, str], where: str) -> None:
        self.record, self.columns, self.where = record, columns, where

    def fault(self, field: str, reason: str) -> UserError:
        column = self.columns.get(field, field)
        return UserError(f"{self.where}: field {column!r} {reason}; the record has: {_names(self.record)}")

    def get(self, field: str) -> Any:
        """None stands for absent: tables fill the fields that a record lacks with nulls."""
        return self.record.get(self.columns.get(field, field))

    def require(self, field: str) -> Any:
        value = self.get(field)
        if value is None:
            column = self.columns.get(field, field)
            raise self.fault(field, "is null" if column in self.record else "is missing")
        return value

    def text(self, field: str) -> str:
        return self.check_text(self.require(field), field)

    def check_text(self, value: Any, field: str, part: str = "") -> str:
        if not isinstance(value, str):
            raise self.fault(field, f"{part}must be a string, not {type(value).__name__}")
        return value

    def objects(self, field: str) -> list[dict[str, Any]]:
        value = self.require(field)
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise self.fault(field, "must be a list of objects")
        if not value:
            raise self.fault(field, "is empty")
        return value

    def integers(self, field: str) -> list[int]:
        value = self.require(field)
        # bool is a subclass of int, and no token id
        if not isinstance(value, list) or not all(type(entry) is int for entry in value):
            raise self.fault(field, "must be a list of integers")
        return value


def _from_alpaca(fields: _Fields) -> Conversation:
    messages = []
    if fields.get("system"):
        messages.append({"role": "system", "content": fields.text("system")})
    history = fields.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise fields.fault("history", "must be a list of [question, answer]")
    for i, (question, answer) in enumerate(history):
        messages.append({"role": "user", "content": fields.check_text(question, "history", f"entry {i} ")})
        messages.append({"role": "assistant", "content": fields.check_text(answer, "history", f"entry {i} ")})
    instruction = fields.text("instruction")
    if fields.get("input"):
        instruction = f"{instruction}\n\n{fields.text('input')}"
    messages.append({"role": "user", "content": instruction})
    messages.append({"role": "assistant", "content": fields.text("output")})
    return Conversation(messages)


def _from_sharegpt(fields: _Fields) -> Conversation:
    messages = []
    if fields.get("system"):
        messages.append({"role": "system", "content": fields.text("system")})
    for i, entry in enumerate(fields.objects("conversations")):
        sender = entry.get("from")
        if not isinstance(sender, str) or sender not in _SHAREGPT_ROLES:
            allowed = ", ".join(_SHAREGPT_ROLES)
            raise fields.fault(
                "conversations", f"entry {i} has unknown 'from': {reprlib.repr(sender)}; allowed: {allowed}"
            )
        value = fields.check_text(entry.get("value"), "conversations", f"entry {i} 'value' ")
        message: dict[str, Any] = {"role": _SHAREGPT_ROLES[sender], "content": value}
        if sender == "function_call":
            message |= {"content": "", "tool_calls": [{"type": "function", "function": _parse_call(fields, value, i)}]}
        messages.append(message)
    return Conversation(messages, _tools(fields))


def _parse_call(fields: _Fields, value: str, index: int) -> dict[str, Any]:
    try:
        call = json.loads(value)
    except (ValueError, RecursionError):
        call = None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
        raise fields.fault("conversations", f'entry {index} must be JSON: {{"name": ..., "arguments": ...}}')
    return {"name": call["name"], "arguments": call["arguments"]}


def _to_message(fields: _Fields, entry: dict[str, Any], index: int) -> dict[str, Any]:
    message = {name: value for name, value in entry.items() if value is not None}
    if message.get("role") not in ROLES:
        given, allowed = reprlib.repr(message.get("role")), ", ".join(ROLES)
        raise fields.fault("messages", f"entry {index} has unknown role {given}; allowed: {allowed}")
    if "tool_calls" in message:
        calls = message["tool_calls"]
        if not isinstance(calls, list) or not all(_is_call(call) for call in calls):
            raise fields.fault("messages", f"entry {index} 'tool_calls' must be a list of {{function: {{name, ...}}}}")
        message.setdefault("content", "")
    message["content"] = fields.check_text(message.get("content"), "messages", f"entry {index} 'content' ")
    return message


def _is_call(value: Any) -> bool:
    function = value.get("function") if isinstance(value, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _tools(fields: _Fields) -> list[dict[str, Any]] | None:
    tools = fields.get("tools")
    if isinstance(tools, str):  # tables keep them as JSON text, for want of a common type
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise fields.fault("tools", "is not JSON") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(_is_call(tool) for tool in tools):
        raise fields.fault("tools", "must be a list of {type, function: {name, ...}}")
    return tools


def _from_tokenized(fields: _Fields) -> Tokenized:
    input_ids = fields.integers("input_ids")
    if fields.get("attention_mask") is not None and 0 in fields.integers("attention_mask"):
        raise fields.fault("attention_mask", "has zeros; allowed: samples without padding")
    if fields.get("labels") is None:
        return Tokenized(input_ids, [True] * len(input_ids))
    labels = fields.integers("labels")
    if len(labels) != len(input_ids):
        raise fields.fault("labels", f"has {len(labels)} entries, input_ids {len(input_ids)}")
    for i, (label, token) in enumerate(zip(labels, input_ids, strict=True)):
        if label not in (token, IGNORE_INDEX):
            raise fields.fault(
                "labels", f"entry {i} is {label}; allowed: the same as input_ids ({token}) or {IGNORE_INDEX}"
            )
    return Tokenized(input_ids, [label != IGNORE_INDEX for label in labels])


def _names(record: Record) -> str:
    """The record's field names, fit for one line of a message."""
    names = ", ".join(name if name.isprintable() else ascii(name) for name in record) or "no fields"
    return names if len(names) <= 200 else f"{names[:200]}..."
