"""The real commands as processes: `python -m dist_qft ...`, alone or on several ranks through the launcher."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

TIMEOUT_SECONDS = 180
_REPOSITORY = Path(__file__).parents[2]


def is_rank(process: psutil.Process, rank: int | None = None) -> bool:
    """True if this process is a rank, or that rank: by its environment, or by its name if the launcher forked it."""
    name, variable = process.name(), process.environ().get("RANK")
    number = name.removeprefix("rank ") if name.startswith("rank ") else variable
    return number is not None and rank in (None, int(number))


def launcher_of(module: str, folder: Path) -> tuple[list[str], dict[str, str]]:
    """Words that start the launcher with ranks that run a module of `folder`, and the variables that it needs."""
    program = f"import sys; from dist_qft.launch.command import main; sys.exit(main(module={module!r}))"
    return [sys.executable, "-c", program], {"PYTHONPATH": f"{folder}:{_REPOSITORY}"}


class Finished(NamedTuple):
    """The outcome of a command as the shell sees it."""

    code: int
    out: str
    err: str


class Command:
    """A started command in a session of its own; use as a context, which ends what is left of it.

    Args:
        ranks: through the launcher on so many; None without it.
        wrapper: words before the command.
        program: words in place of the command or the launcher.
    """

    def __init__(
        self,
        *arguments: object,
        ranks: int | None = None,
        wrapper: tuple[str, ...] = (),
        program: Sequence[object] | None = None,
    ) -> None:
        self.ranks = ranks or 1  # of this command
        options = [] if ranks is None else ["--nproc-per-node", str(ranks), "--"]
        ours = [sys.executable, "-m", "dist_qft" if ranks is None else "dist_qft.launch"]
        words = [*wrapper, *map(str, program or ours), *options, *map(str, arguments)]
        self.process = subprocess.Popen(
            words,
            env={key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._family():
            process.kill()
        self.process.communicate()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Watch closely until something is so; the command must still be running then."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not condition():
            if self.process.poll() is not None:
                raise AssertionError(f"ended with {self.process.returncode}:\n{self.process.stderr.read()}")
            if time.monotonic() > deadline:
                raise AssertionError("it did not come to that")
            time.sleep(0.005)

    def rank(self, rank: int) -> psutil.Process:
        """One of the processes that the launcher started."""
        ranks = psutil.Process(self.process.pid).children(recursive=True)
        return next(process for process in ranks if is_rank(process, rank))

    def finish(self, seconds: float = TIMEOUT_SECONDS) -> Finished:
        out, err = self.process.communicate(timeout=seconds)
        return Finished(self.process.returncode, out, err)

    def _family(self) -> list[psutil.Process]:
        try:
            leader = psutil.Process(self.process.pid)
            return [*leader.children(recursive=True), leader]
        except psutil.NoSuchProcess:
            return []
