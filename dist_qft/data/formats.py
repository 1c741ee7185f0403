"""The meaning of a record's fields: from a record of one of nine known formats to a sample.

    alpaca             instruction, output [input, system, history: list of [question, answer]]
    sharegpt           conversations: list of {from, value} or of {role, content} [system, tools]
    messages           messages: the same under another name [system, tools]
    prompt-completion  prompt, completion: plain text without a chat template, or two lists of messages [system, tools]
    text               text
    tokenized          input_ids [labels: the same ids, or -100 where nothing is predicted; masks, see `tokenized`]
    classification     text, label [text_pair]; for the tasks that predict labels, and those alone
    preference         chosen, rejected [prompt, system, tools]: texts or lists of messages; for dpo, orpo and kto
    unpaired-preference  prompt, completion, label: true for an answer that is wanted [system, tools]; for kto

`columns` in the config maps these field names to the data's own. No tokenizer here: see `tokens`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dist_qft.config.data_schema import OF_TASKS, TASK_FORMATS, DatasetConfig
from dist_qft.data import tokenized
from dist_qft.data.fields import Fields, field_names
from dist_qft.data.messages import MEDIA, read_conversation, read_messages, with_system
from dist_qft.data.pairs import read_pair, read_prompt, read_rated
from dist_qft.data.records import Record
from dist_qft.data.samples import AnySample, Conversation, Labelled, Message, Text
from dist_qft.errors import UserError

# Fields that change what other programs train. To leave them out would train something else without a word.
_UNSUPPORTED = (*MEDIA, "chat_template_kwargs")


# What data sets call the fields of a question with its answer, of a conversation and of a text.
_ALIKE = {
    "instruction": ("prompt", "question", "query", "user", "problem", "source"),
    "output": ("completion", "answer", "response", "assistant", "reply", "solution", "target", "output_text"),
    "messages": ("conversation", "dialog", "dialogue", "chat", "turns"),
    "text": ("content", "document", "body", "article", "sentence"),
    # Without these a question or its answer would lack what it is about.
    "input": ("context",),
    "system": ("system_prompt", "system_message"),
}


class FormatFields(NamedTuple):
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


FORMATS = {
    "alpaca": FormatFields(("instruction", "output"), ("input", "system", "history")),
    "sharegpt": FormatFields(("conversations",), ("system", "tools")),
    "messages": FormatFields(("messages",), ("system", "tools")),
    "prompt-completion": FormatFields(("prompt", "completion"), ("system", "tools")),
    "text": FormatFields(("text",)),
    "tokenized": FormatFields(("input_ids",), tokenized.OPTIONAL),
    "classification": FormatFields(("text", "label"), ("text_pair",)),
    "preference": FormatFields(("chosen", "rejected"), ("prompt", "system", "tools")),
    "unpaired-preference": FormatFields(("prompt", "completion", "label"), ("system", "tools")),
}
# A text beside a label is also just a text, a rated answer just an answer: the task decides.
_GUESSED = tuple(name for name in FORMATS if name not in OF_TASKS)


def resolve_format(
    dataset: DatasetConfig, first: tuple[Record, str], key: str, guessed: Sequence[str] = _GUESSED
) -> str:
    """The format of `dataset`, for `auto` the only one whose required fields the first record (with its place) has.

    Also checks that `columns` names fields of that format. `key` is the config section, for messages; `guessed` are the
    formats that `auto` may stand for.
    """
    record, where = first
    name: str = dataset.format
    if name == "auto":
        fits = [
            format_name
            for format_name in guessed
            if all(dataset.columns.get(field, field) in record for field in FORMATS[format_name].required)
        ]
        if len(fits) > 1:
            raise UserError(f"{where}: the fields {field_names(record)} fit {' and '.join(fits)}; set {key}.format")
        if not fits:
            needs = "; ".join(f"{format_name}: {', '.join(FORMATS[format_name].required)}" for format_name in guessed)
            hint = _tasks_of(record, guessed) or f"set {key}.columns{_columns_for(record, guessed)}"
            raise UserError(f"{where}: the fields {field_names(record)} fit no format ({needs}); {hint}")
        name = fits[0]
    known = FORMATS[name].required + FORMATS[name].optional
    for field in dataset.columns:
        if field not in known:
            raise UserError(f"{key}.columns: got {field!r}, must be a field of {name}: {', '.join(known)}")
    return name


def format_for_task(dataset: DatasetConfig, first: tuple[Record, str], key: str, task: str) -> str:
    """`resolve_format` among the formats of `task.name`, if it has its own; a single one needs no setting."""
    own = TASK_FORMATS.get(task, ())
    if len(own) == 1:
        dataset = dataset.model_copy(update={"format": own[0]})
    return resolve_format(dataset, first, key, own or _GUESSED)


def _tasks_of(record: Record, guessed: Sequence[str]) -> str:
    """A hint at the tasks, other than the run's, that take such records; empty if none does."""
    tasks = [
        task
        for task, formats in TASK_FORMATS.items()
        if any(set(FORMATS[name].required) <= set(record) for name in formats if name not in guessed)
    ]
    return f"they are data of task.name {' or '.join(tasks)}" if tasks else ""


def _columns_for(record: Record, guessed: Sequence[str]) -> str:
    """An example of columns under which the record would fit a format, if names that others use tell one."""
    known = {name.strip().casefold(): name for name in record if len(name) < 100}
    none: dict[str, tuple[str, ...]] = {}
    for alike in (none, _ALIKE):
        for format_name in guessed:
            required, optional = FORMATS[format_name]
            found = {
                field: next((known[name] for name in (field, *alike.get(field, ())) if name in known), None)
                for field in required
            }
            if all(name is not None and name not in optional for name in found.values()):
                more = (name for name in optional if name not in known)
                found |= {
                    field: next((known[name] for name in _ALIKE.get(field, ()) if name in known), None)
                    for field in more
                }
                columns = [f"{field}: {_in_yaml(name)}" for field, name in found.items() if name and name != field]
                return f", such as {{{', '.join(columns)}}}"
    return ""


def _in_yaml(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z_]\w*", name) else json.dumps(name)


def to_sample(record: Record, format_name: str, columns: Mapping[str, str], where: str) -> AnySample:
    """Interpret one record; UserError naming `where`, the field and the fields at hand if it does not fit."""
    fields = Fields(record, columns, where)
    for name in _UNSUPPORTED:
        if name not in columns.values() and record.get(name):
            raise fields.fault(name, "is not supported; must be empty or absent")
    match format_name:
        case "alpaca":
            return _from_alpaca(fields)
        case "sharegpt":
            return read_conversation(fields, read_messages(fields, "conversations"))
        case "messages":
            return read_conversation(fields, read_messages(fields, "messages"))
        case "prompt-completion":
            return read_prompt(fields)
        case "text":
            return Text(fields.text("text"))
        case "tokenized":
            return tokenized.read_tokenized(fields)
        case "classification":
            pair = fields.text("text_pair") if fields.get("text_pair") is not None else None
            return Labelled(fields.text("text"), pair, fields.require("label"))
        case "preference":
            return read_pair(fields)
        case "unpaired-preference":
            return read_rated(fields)
    raise ValueError(f"unknown format {format_name!r}")


def _from_alpaca(fields: Fields) -> Conversation:
    messages: list[Message] = with_system(fields, [])
    history = fields.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise fields.fault("history", "must be a list of [question, answer]")
    for i, (question, answer) in enumerate(history):
        messages.append({"role": "user", "content": fields.check_text(question, "history", f"entry {i} ")})
        messages.append({"role": "assistant", "content": fields.check_text(answer, "history", f"entry {i} ")})
    instruction, inputs = fields.text("instruction"), {}
    if fields.get("input"):
        inputs = {len(messages): fields.text("input")}
        instruction = f"{instruction}\n\n{fields.text('input')}"
    messages.append({"role": "user", "content": instruction})
    messages.append({"role": "assistant", "content": fields.text("output")})
    return Conversation(messages, inputs=inputs)
