"""Faults that pydantic found in a stored file, in one line."""

import textwrap

from pydantic import ValidationError

_LONGEST = 300  # characters: names of keys may be of any length


def first_fault(error: ValidationError) -> str:
    """Key ("content" for the file as a whole) and reason of the first fault, and the number of the others.

    For content of any size: nobody reads two thousand of them.
    """
    faults = error.errors(include_url=False, include_context=False)
    place = ".".join(map(str, faults[0]["loc"])) or "content"
    more = f" (and {len(faults) - 1} more)" if faults[1:] else ""
    return textwrap.shorten(f"{place}: {faults[0]['msg']}", _LONGEST) + more


def every_fault(error: ValidationError) -> str:
    """Key and reason of every fault, for a record of a few settings; the reason alone for the record as a whole."""
    return "; ".join(": ".join([*map(str, fault["loc"]), fault["msg"]]) for fault in error.errors())
