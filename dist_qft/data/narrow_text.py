"""Text files with one character in memory for each byte, and their values as text again.

Python keeps a text in four bytes a character if it has one emoji: a file of 1 GB whose rows hold some would take 4 GB
before its first row is known. The syntax of JSON and CSV is ASCII, of which UTF-8 never uses a byte for anything else.
So a file is taken apart as if it were Latin-1 (*narrow*), and only the values of the row at hand become text.
"""

import codecs
import gzip
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from dist_qft.data.records import RowError
from dist_qft.errors import UserError

PART = 2**20  # characters of a long line that are read at a time
_DECODED = 2**16  # bytes that become text at a time
_UNPACKED = 2**28  # bytes of the longest line in a compressed file: few of its bytes can hold gigabytes
_MARK = codecs.BOM_UTF8.decode("latin-1")
# In JSON. Its groups: the digits of a character that a narrow text cannot tell from bytes, and of a pair the second's.
_ESCAPE = re.compile(
    r"\\(?:u(?!00[0-7])([0-9a-fA-F]{4})(?:(?<=u[dD][89abAB]..)\\u([dD][c-fC-F][0-9a-fA-F]{2}))?|.)", re.DOTALL
)


def open_narrow(path: Path) -> TextIO:
    """A file, or what one named .gz holds. Lines keep their ends (LF, CR LF or CR); a byte order mark is skipped."""
    opened = gzip.open if path.suffix == ".gz" else open
    stream = io.TextIOWrapper(opened(path, "rb"), encoding="latin-1", newline="")
    if stream.read(len(_MARK)) != _MARK:
        stream.seek(0)
    return stream


def narrow_lines(path: Path) -> Iterator[str]:
    """The lines of a file, with their ends. Long ones are put together from parts, to be in memory twice at most.

    UserError: a line in a compressed file is too long.
    """
    with open_narrow(path) as stream:
        parts: list[str] = []
        part = stream.readline(PART)
        while part:
            parts.append(part)
            require_unpackable(path, len(parts) * PART)
            part = stream.readline(PART)
            if part == "\n" and parts[-1][-1] == "\r":  # one line end, which the limit has split
                parts.append(part)
                part = stream.readline(PART)
            if not part or parts[-1][-1] in "\r\n":
                parts[:] = ["".join(parts)]
                yield parts.pop()


def require_unpackable(path: Path, size: int) -> None:
    """Refuse a line or document of `size` bytes if it comes out of a compressed file and is too long for that."""
    if path.suffix == ".gz" and size > _UNPACKED:
        raise UserError(f"{path}: a line of more than {_UNPACKED // 2**20} MiB once unpacked; unpack the file first")


def require_text(line: str, path: Path, number: int) -> None:
    """Refuse a line with bytes that are not UTF-8. A NUL is, but in practice the mark of a torn file or of UTF-16."""
    bad = line.find("\0")
    if bad < 0 and not line.isascii():
        try:
            for _ in _decoded(line, "strict"):
                pass
        except UnicodeDecodeError as error:
            bad = error.start
    if bad >= 0:
        fault = f"byte 0x{ord(line[bad]):02x} is not UTF-8" if line[bad] != "\0" else "a NUL byte"
        raise RowError(f"{path}:{number}:{bad + 1}: {fault}; must be UTF-8 text")


def widened(text: str) -> str:
    """The text that a narrow one stands for."""
    return text if text.isascii() else "".join(_decoded(text))


def with_narrow_escapes(text: str) -> str:
    """A narrow JSON text with the UTF-8 bytes of characters in place of their escapes; a short one as it is."""
    if len(text) <= PART or "\\u" not in text:
        return text
    parts: list[str] = []
    written, done = bytearray(), 0
    for escape in _ESCAPE.finditer(text):
        if escape[1] is None:
            continue
        code = int(escape[1], 16)
        if escape[2] is not None:
            code = 0x10000 + ((code - 0xD800) << 10) + int(escape[2], 16) - 0xDC00
        if escape.start() - done + len(written) > _DECODED:
            parts += [written.decode("latin-1"), text[done : escape.start()]]
            written.clear()
        else:
            written += text[done : escape.start()].encode("latin-1")
        written += chr(code).encode(errors="surrogatepass")  # JSON can write half of a pair
        done = escape.end()
    return "".join([*parts, written.decode("latin-1"), text[done:]])


def widen(record: dict[str, Any] | list[Any], longest: int | None = None) -> None:
    """Replace all texts in a narrow record, its keys included, by those that they stand for; one after the other.

    Of a text of many more than `longest` characters the beginning, if more than that.
    """
    holders: list[Any] = [record]
    while holders:
        holder = holders.pop()
        if isinstance(holder, dict) and not all(map(str.isascii, holder)):
            entries = {widened(key): value for key, value in holder.items()}
            holder.clear()
            holder.update(entries)
            del entries
        for key in holder if isinstance(holder, dict) else range(len(holder)):
            match holder[key]:
                case dict() | list():
                    holders.append(holder[key])
                case str() if not holder[key].isascii():
                    parts, characters = [], 0
                    for part in _decoded(holder[key]):
                        parts.append(part)
                        characters += len(part)
                        if longest is not None and characters > longest:
                            break
                    holder[key] = None  # the narrow text goes before the wide one is put together
                    holder[key] = "".join(parts)


def _decoded(text: str, errors: str = "surrogatepass") -> Iterator[str]:
    """Parts of the text that a narrow one stands for. UnicodeDecodeError with the place in all of the narrow text."""
    at = 0
    while at < len(text):
        part, last = text[at : at + _DECODED].encode("latin-1"), at + _DECODED >= len(text)
        try:
            decoded, used = codecs.utf_8_decode(part, errors, last)
        except UnicodeDecodeError as error:
            raise UnicodeDecodeError("utf-8", part, at + error.start, at + error.end, error.reason) from None
        yield decoded
        at += used
