"""Messages in the forms that data sets and logs use, to messages as chat templates take them.

Entries are {role, content} (OpenAI, Hugging Face) or {from, value} (ShareGPT). Contents may be lists of text parts.
Calls may be whole, bare {name, arguments}, several at once, or turns of their own (`function_call`).
"""

import json
import reprlib
from typing import Any

from dist_qft.data.fields import Fields
from dist_qft.data.filled_nulls import as_schema, with_known_arguments
from dist_qft.data.samples import REASONING, WEIGHT, Conversation, Message, Tool
from dist_qft.data.standins import REASONING_KEYS

CALL_TURN = "function_call"
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "tool_response": "tool",
    CALL_TURN: CALL_TURN,
    "tool_call": CALL_TURN,
}
# The keys with which programs say whether an answer is learnt (OpenAI; axolotl; ms-swift).
_WEIGHTS = (WEIGHT, "train", "training", "loss")
# Media and marks within a message: to leave them out would train something else without a word.
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
_UNSUPPORTED = (*MEDIA, "train_detail")
_MEDIA_PARTS = {"image", "image_url", "input_image", "audio", "audio_url", "input_audio", "video", "video_url"}
_TEXT_PARTS = ("text", "input_text", "output_text")


def read_messages(fields: Fields, field: str) -> list[Message]:
    """The messages of a field that holds a list of entries.

    Raises:
        RowError: an entry is none of the known forms; names the entry and the key.
    """
    messages: list[Message] = []
    previous = None
    for i, entry in enumerate(fields.objects(field)):
        role = _role(fields, field, entry, i)
        if unsupported := next((key for key in _UNSUPPORTED if entry.get(key)), None):
            raise fields.fault(field, f"entry {i} {unsupported!r} is not supported; must be empty or absent")
        if role != CALL_TURN:
            messages.append(_message(fields, field, entry, role, i))
        elif previous == CALL_TURN:  # parallel calls, one entry each
            _add_calls(fields, field, messages[-1], _call_turn(fields, field, entry, i), i)
        else:
            messages.append(_call_turn(fields, field, entry, i))
        previous = role
    return messages


def read_conversation(fields: Fields, messages: list[Message], prompt_length: int = 0) -> Conversation:
    """A record's messages behind its field `system`, with its tools. So many of the messages are the prompt."""
    whole, tools = with_system(fields, messages), read_tools(fields)
    length = prompt_length + len(whole) - len(messages) if prompt_length else 0
    return Conversation(with_known_arguments(whole, tools), tools, prompt_length=length)


def with_system(fields: Fields, messages: list[Message]) -> list[Message]:
    """The messages behind the field `system`, unless they begin with it already.

    Raises:
        RowError: they begin with another system message.
    """
    if not fields.get("system"):
        return messages
    system = fields.text("system")
    if not messages or messages[0]["role"] not in ("system", "developer"):
        return [{"role": "system", "content": system}, *messages]
    if (own := messages[0]["content"]).strip() != system.strip():
        reason = f"is {reprlib.repr(system)} beside a conversation whose system message is {reprlib.repr(own)}"
        raise fields.fault("system", f"{reason}; must be one of them")
    return messages


def _role(fields: Fields, field: str, entry: dict[str, Any], index: int) -> str:
    key = "role" if entry.get("role") is not None or "from" not in entry else "from"
    role = ROLES.get(entry[key].lower()) if isinstance(entry.get(key), str) else None
    if role is None:
        given = reprlib.repr(entry.get(key))
        raise fields.fault(field, f"entry {index} has unknown {key!r} {given}, must be one of {', '.join(ROLES)}")
    return role


def _message(fields: Fields, field: str, entry: dict[str, Any], role: str, index: int) -> Message:
    own = ("role", "from", "content", "value", "tool_calls", CALL_TURN, *_WEIGHTS, *REASONING_KEYS)
    message = {"role": role} | {key: value for key, value in entry.items() if key not in own and value is not None}
    text, thoughts = _content(fields, field, entry, role, index)
    reasoning = _reasoning(fields, field, entry, index)
    thoughts = thoughts if reasoning is None else reasoning
    if thoughts:
        message[REASONING] = thoughts
        text = "" if text is None and role == "assistant" else text
    calls = entry.get("tool_calls") or entry.get(CALL_TURN)
    if calls:
        message["tool_calls"] = _calls(fields, field, calls, index)
        text = text or ""
    message["content"] = fields.check_text(text, field, f"entry {index} 'content' ")
    return message | _weight(fields, field, entry, index, role)


def _call_turn(fields: Fields, field: str, entry: dict[str, Any], index: int) -> Message:
    """The message of an entry that is a call."""
    message: Message = {"role": "assistant", "content": ""}
    if (reasoning := _reasoning(fields, field, entry, index)) is not None:
        message[REASONING] = reasoning
    message["tool_calls"] = _calls(fields, field, _first(entry, "value", "content"), index)
    return message | _weight(fields, field, entry, index)


def _add_calls(fields: Fields, field: str, message: Message, parallel: Message, index: int) -> None:
    """Add a further entry's calls to the message of those that are made at the same time."""
    if message.get(WEIGHT) != parallel.get(WEIGHT):
        raise fields.fault(field, f"entry {index} has another weight than the parallel call before it")
    if parallel.get(REASONING, message.get(REASONING)) != message.get(REASONING):
        raise fields.fault(
            field, f"entry {index} has reasoning of its own beside a parallel call; must be on the first"
        )
    message["tool_calls"] += parallel["tool_calls"]


def _reasoning(fields: Fields, field: str, entry: dict[str, Any], index: int) -> str | None:
    reasoning = _first(entry, *REASONING_KEYS)
    return None if reasoning is None else fields.check_text(reasoning, field, f"entry {index} reasoning ")


def _content(fields: Fields, field: str, entry: dict[str, Any], role: str, index: int) -> tuple[Any, str]:
    """The content as one text, and the reasoning among its parts. A tool's result may be any value: JSON text of it."""
    content = _first(entry, "content", "value")
    if role == "tool" and content is not None and not isinstance(content, str) and not _is_parts(content):
        return json.dumps(content, ensure_ascii=False), ""
    if not isinstance(content, list):
        return content, ""
    texts, thoughts = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else "text"
        text = part.get("text" if kind in _TEXT_PARTS else "thinking") if isinstance(part, dict) else part
        if role == "assistant" and isinstance(part, dict) and any(part.get(key, 1) in (0, False) for key in _WEIGHTS):
            raise fields.fault(field, f"entry {index} has a part that is not trained; must be a message of its own")
        if kind in _TEXT_PARTS and isinstance(text, str):
            texts.append(text)
        elif kind == "thinking" and isinstance(text, str):
            thoughts.append(text)
        else:
            raise fields.fault(field, f"entry {index} has a part of type {reprlib.repr(kind)}, must be text")
    return "".join(texts), "".join(thoughts)


def _first(entry: dict[str, Any], *keys: str) -> Any:
    """The value of the first of the keys that has one: a set that mixes two spellings fills the other with nulls."""
    return next((entry[key] for key in keys if entry.get(key) is not None), None)


def _is_parts(content: Any) -> bool:
    """True for a list of text parts, or one with media, which are refused; a tool's result may be any other list."""
    if not isinstance(content, list) or not content or not all(isinstance(entry, dict) for entry in content):
        return False
    if any(entry.get("type") in _MEDIA_PARTS and (len(entry) == 1 or _MEDIA_PARTS & entry.keys()) for entry in content):
        return True
    return all(entry.get("type") in _TEXT_PARTS and isinstance(entry.get("text"), str) for entry in content)


def _weight(fields: Fields, field: str, entry: dict[str, Any], index: int, role: str = "assistant") -> dict[str, int]:
    """{"weight": 0} for a message that is context only."""
    weights = [entry[key] for key in _WEIGHTS if entry.get(key) is not None]
    if any(weight not in (0, 1) for weight in weights):
        raise fields.fault(field, f"entry {index} has a weight of {reprlib.repr(weights[0])}, must be 0 or 1")
    return {WEIGHT: 0} if role == "assistant" and 0 in weights else {}


def _calls(fields: Fields, field: str, value: Any, index: int) -> list[dict[str, Any]]:
    """Calls as {type, function: {name, arguments}}, from one or a list of them, whole or bare, or JSON text of that."""
    form = f'entry {index} calls must be {{"name": ..., "arguments": {{...}}}} or a list of such: '
    value = fields.from_json(value, field, form)
    calls = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise fields.fault(field, f"{form}got {reprlib.repr(call)}")
        arguments = function.get("arguments")
        if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
            arguments = {}  # of a function that takes none
        try:
            parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
        except (ValueError, RecursionError):
            parsed = None
        if not isinstance(parsed, dict):
            raise fields.fault(field, f"entry {index} 'arguments' must be an object: got {reprlib.repr(arguments)}")
        outside = {key: entry for key, entry in call.items() if function is not call and entry is not None}
        # Text stays text: some templates write it as it is.
        named = {"name": function["name"], "arguments": arguments}
        calls.append({"type": "function", **outside, "function": named})
    return calls


def read_tools(fields: Fields) -> list[Tool] | None:
    """The tools that a conversation offers, whole or bare; None if there are none.

    Nulls that a table filled in are left out.

    Raises:
        RowError: `tools` holds something else.
    """
    # OpenAI's API first called them functions.
    tools = fields.from_json(fields.get("tools") or fields.record.get("functions") or None, "tools")
    if not tools:
        return None
    wrapped = []
    for tool in tools if isinstance(tools, list) else [tools]:
        tool = fields.from_json(tool, "tools")
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise fields.fault("tools", "must be a list of {type, function: {name, ...}} or of {name, ...}")
        wrapped.append(as_schema(tool if function is not tool else {"type": "function", "function": tool}))
    return wrapped
