"""The first fault that pydantic found in a stored file, in one line: nobody reads two thousand of them."""

import textwrap

from pydantic import ValidationError

_LONGEST = 300  # characters: names of keys may be of any length


def first_fault(error: ValidationError) -> str:
    """Its key and reason ("content" for the file as a whole), and the number of the others."""
    faults = error.errors(include_url=False, include_context=False)
    place = ".".join(map(str, faults[0]["loc"])) or "content"
    more = f" (and {len(faults) - 1} more)" if faults[1:] else ""
    return textwrap.shorten(f"{place}: {faults[0]['msg']}", _LONGEST) + more
