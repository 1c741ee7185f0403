"""A record's fields under our names, each checked when it is taken."""

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from dist_qft.data.records import Record, RowError

_PYTHON = re.compile(r"\s*\[?\s*\{\s*'")
_NOT_PYTHON = " (as json.dumps writes it: Python's own quotes are not JSON)"
_SENDERS = ("role", "from")
_JSON_LIST = re.compile(r"\s*\[\s*\{\s*\"")
_LIKE_MESSAGES = re.compile(r"\s*\[\s*\{\s*(?P<quote>['\"])(?:role|from|content|value)(?P=quote)\s*:")


class Fields:
    """The fields of one record. columns: our field name -> the data's own. where: the record's place, for messages."""

    def __init__(self, record: Record, columns: Mapping[str, str], where: str) -> None:
        self.record, self.columns, self.where = record, columns, where

    def fault(self, field: str, reason: str) -> RowError:
        column = self.columns.get(field, field)
        return RowError(f"{self.where}: field {column!r} {reason}; the record has: {field_names(self.record)}")

    def get(self, field: str) -> Any:
        """The value of a field; None if it is absent, since tables fill the fields that a record lacks with nulls."""
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
        value = self.from_json(self.require(field), field)
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise self.fault(field, "must be a list of objects")
        if not value:
            raise self.fault(field, "is empty")
        return value

    def from_json(self, value: Any, field: str, part: str = "") -> Any:
        """A list or object; tables keep some as JSON text, for want of a common type."""
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            raise self.fault(field, f"{part}must be a list of objects or JSON text of one{_hint(value)}") from None

    def holds_messages(self, field: str) -> bool:
        """True for a list, or JSON text of a list of messages, as tables keep it; false for any other value.

        Raises:
            RowError: it begins like such a text, but is none: nobody means it to be trained as it stands.
        """
        value = self.require(field)
        if isinstance(value, str) and (_JSON_LIST.match(value) or _LIKE_MESSAGES.match(value)):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                if _LIKE_MESSAGES.match(value):
                    allowed = f"a text, a list of messages or JSON text of one{_hint(value)}"
                    raise self.fault(field, f"must be {allowed}") from None
                return False
            return all(isinstance(each, dict) and any(each.get(key) for key in _SENDERS) for each in value)
        return isinstance(value, list)

    def integers(self, field: str) -> list[int]:
        value = self.require(field)
        # bool is a subclass of int, and no token id
        if not isinstance(value, list) or not all(type(entry) is int for entry in value):
            raise self.fault(field, "must be a list of integers")
        return value


def _hint(text: str) -> str:
    """The reason why a text that looks like JSON is none, if it is Python's own notation."""
    return _NOT_PYTHON if _PYTHON.match(text) else ""


def field_names(record: Collection[str]) -> str:
    """The field names of a record, fit for one line of a message."""
    names = ", ".join(name if name.isprintable() else ascii(name) for name in record) or "no fields"
    return names if len(names) <= 200 else f"{names[:200]}..."
