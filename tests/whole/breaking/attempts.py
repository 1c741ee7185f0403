"""The attempts of one kind, their outcomes, and the time and the seed that they have."""

import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

LONGEST_OUTPUT = 101  # lines: a refusal is one or two, but of a config it names up to 100 faults
CODES = (0, 2, 3, 4, 5, 6, 75)  # those of `dist_qft.errors`, and success


@dataclass(frozen=True)
class Ended:
    """The end of a command.

    Attributes:
        code: exit code, or minus a signal's number; None if it had to be killed for its time.
        peak_bytes: largest resident memory.
    """

    code: int | None
    output: str
    seconds: float
    peak_bytes: int

    @property
    def last_line(self) -> str:
        return self.output.strip().rpartition("\n")[2][:300]


@dataclass
class Tally:
    """Outcomes of one kind of attempt.

    Attributes:
        outcomes: how often each outcome came.
        failures: seed and number of an attempt, and what went wrong.
    """

    name: str
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    @property
    def tried(self) -> int:
        return sum(self.outcomes.values())

    def fail(self, attempt: str, reason: str) -> None:
        self.failures.append(f"{self.name} {attempt}: {reason}")
        print(self.failures[-1], file=sys.stderr, flush=True)

    def line(self) -> str:
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in self.outcomes.most_common())
        return f"| {self.name} | {self.tried} | {outcomes} | {len(self.failures)} |"


@dataclass(frozen=True)
class Budget:
    """The end of a kind of attempts: so many of them, or so many seconds, whichever is first; `only` is one alone."""

    seed: int
    attempts: int
    seconds: float
    only: int | None = None

    def each(self) -> Iterator[tuple[int, random.Random]]:
        """Number of each attempt, and its chance, which depends on the seed and on that number alone."""
        if self.only is not None:
            yield self.only, random.Random(f"{self.seed} {self.only}")
            return
        deadline = time.monotonic() + self.seconds
        for number in range(self.attempts):
            if time.monotonic() > deadline:
                return
            yield number, random.Random(f"{self.seed} {number}")


Breaker = Callable[[Budget], Tally]


def fault_in(ended: Ended, peak_bytes: int) -> str | None:
    """The fault in the end of a command that met a hostile input; None if it ended well, or refused it well.

    Args:
        peak_bytes: the most that it may hold.
    """
    if ended.code is None:
        return f"did not end in {ended.seconds:.0f} s: {ended.last_line}"
    if "Traceback (most recent call last)" in ended.output:
        return f"traceback, code {ended.code}: {ended.last_line}"
    if ended.code not in CODES:
        return f"code {ended.code}: {ended.last_line}"
    if ended.code != 0 and "error: " not in ended.output:
        return f"code {ended.code} without a word"
    if ended.peak_bytes > peak_bytes:
        return f"held {ended.peak_bytes >> 20} MiB, may hold {peak_bytes >> 20}"
    if ended.code != 0 and ended.output.count("\n") > LONGEST_OUTPUT:
        return f"{ended.output.count(chr(10))} lines of output"
    return None
