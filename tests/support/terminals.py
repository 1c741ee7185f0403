"""Pseudo terminals, as a person would see them."""

import contextlib


def shown_on(terminal: int) -> str:
    """The text that was written to the other end of a pseudo terminal until nobody had that end open.

    The kernel hands it on in parts, some of them late: one read may find only the first of them, or none.
    """
    parts = []
    with open(terminal, "rb", buffering=0) as stream, contextlib.suppress(OSError):  # Linux's way to say it is closed
        while part := stream.read(1 << 16):
            parts.append(part)
    return b"".join(parts).decode()
