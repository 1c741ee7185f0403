"""Rows of CSV text, as RFC 4180 and Python's `csv` in its strict mode define them.

Python's own reader keeps a field in 4 bytes a character and doubles that space when it is full. A document of 100 MB
in one field would so take up to 1 GB. Here a field takes what its text takes.
"""

import io
from collections.abc import Iterator


class CsvFault(Exception):
    """The text is not CSV; `CsvRows.line` tells where."""


class CsvRows:
    """Rows of the given lines (with their line ends), each with the number of its first line; [] for a blank line.

    line: number of the last line that was read, from 1.

    Raises:
        CsvFault: a quoted field does not end, or something stands behind its end.
    """

    def __init__(self, lines: Iterator[str], separator: str = ",") -> None:
        self.line = 0
        self._lines = lines
        self._separator = separator
        self._text = ""  # the line at hand, and the place in it
        self._at = 0

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        while self._next_line():
            first = self.line
            row = [] if self._text[0] in "\r\n" else self._row()
            self._text = ""  # a long line is not kept beside its fields
            yield first, row

    def _next_line(self) -> bool:
        self._text, self._at = "", 0
        self._text = next(self._lines, "")
        self.line += bool(self._text)
        return bool(self._text)

    def _row(self) -> list[str]:
        row = []
        while True:
            row.append(self._quoted() if self._text.startswith('"', self._at) else self._plain())
            if not self._text.startswith(self._separator, self._at):
                return row
            self._at += 1

    def _plain(self) -> str:
        start, end = self._at, self._text.find(self._separator, self._at)
        if end < 0:
            end = len(self._text) - len(self._text[-2:]) + len(self._text[-2:].rstrip("\r\n"))
        self._at = max(start, end)
        return self._text[start : self._at]

    def _quoted(self) -> str:
        """The field whose opening quote is at hand. Two quotes in it stand for one."""
        value, opened = io.StringIO(), self.line
        self._at += 1
        while (end := self._closing_quote()) < 0:
            value.write(self._text[self._at :].replace('""', '"'))
            if not self._next_line():
                self.line = opened
                raise CsvFault("a quoted field does not end")
        value.write(self._text[self._at : end].replace('""', '"'))
        self._at = end + 1
        if self._text[self._at : self._at + 1] not in ("", self._separator, "\r", "\n"):
            raise CsvFault(f"{self._separator!r} expected after '\"'")
        return value.getvalue()

    def _closing_quote(self) -> int:
        """The place of the next quote that stands alone; -1 if it is not on this line."""
        place = self._text.find('"', self._at)
        while place >= 0 and self._text.startswith('"', place + 1):
            place = self._text.find('"', place + 2)
        return place
