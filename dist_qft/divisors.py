"""Whole numbers that would do instead of one that does not divide; for messages. Imports nothing."""

from collections.abc import Iterable


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, ascending."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def nearest_divisors(size: int, wanted: int) -> list[int]:
    """The divisors of `size` next to `wanted`, below and above; `wanted` alone if it is one."""
    found = divisors(size)
    below = max(divisor for divisor in found if divisor <= wanted)
    return sorted({below, min((divisor for divisor in found if divisor >= wanted), default=below)})


def nearest_multiples(wanted: int, of: int) -> list[int]:
    """The positive multiples of `of` next to `wanted`, which is none."""
    below = wanted // of * of
    return [below, below + of] if below else [of]


def either(values: Iterable[object]) -> str:
    """The values as words: "1, 2 or 4"."""
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last
