"""Nulls that a table filled in, because other rows have the key, and that JSON made of it spells out.

Tools would be offered, and calls trained, with arguments that they do not have.
"""

from collections.abc import Sequence
from typing import Any

from dist_qft.data.samples import Message, Tool

_VALUES = ("default", "const", "enum", "examples")  # a schema's keys whose values are data, of which null may be one


def as_schema(value: Any) -> Any:
    """A tool or a part of its schema without the keys that are null; only values of the tool's own may be null."""
    if isinstance(value, list):
        return [as_schema(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    kept = {key: entry for key, entry in value.items() if entry is not None or key in ("default", "const")}
    return {key: _as_part(key, entry) for key, entry in kept.items()}


def _as_part(key: str, value: Any) -> Any:
    if key == "properties" and isinstance(value, dict):  # its keys are names, and may be any word
        return {name: as_schema(entry) for name, entry in value.items() if entry is not None}
    return value if key in _VALUES else as_schema(value)


def with_known_arguments(messages: list[Message], tools: Sequence[Tool] | None) -> list[Message]:
    """The messages, whose calls have no argument that is null and that the tool's schema does not have.

    Calls of tools without a schema, and arguments that are JSON text, stay as they are.
    """
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools or ()}
    if not schemas:
        return messages
    return [
        {**message, "tool_calls": [_known_call(call, schemas) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _known_call(call: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    known = _known(function["arguments"], schemas.get(function["name"]))
    return {**call, "function": {**function, "arguments": known}}


def _known(value: Any, schema: Any) -> Any:
    if not isinstance(schema, dict):
        return value
    if isinstance(value, list):
        return [_known(entry, schema.get("items")) for entry in value]
    names = schema.get("properties")
    if not isinstance(value, dict) or not isinstance(names, dict) or schema.get("additionalProperties"):
        return value
    return {key: _known(entry, names.get(key)) for key, entry in value.items() if entry is not None or key in names}
