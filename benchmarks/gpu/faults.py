"""Faults of a run on several ranks: how it ends, who is named, what is written down, and how soon."""

import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import struck
from launches import EXACT, PATIENCE, Place, adapter_of, last_line, not_quick, with_runs
from parts import Figures, Options

from dist_qft.ranks.crash import CRASH_FOLDER
from dist_qft.storage.checkpoint import fault_in, list_checkpoints
from tests.support.commands import Command, launcher_of
from tests.support.faults import FULL_DISK, NO_MOUNTS, kill_last, nothing, on_disk, stepping

_TIMEOUT_SECONDS, _MORE_SECONDS = 20, 15  # the ranks' patience, and what the end may take besides
_LONG, _EVERY = 24, 4  # steps of the run that starts again, and of those after which it is saved


def ended(
    here: Place,
    name: str,
    act: Callable[[Command], None],
    *,
    code: int,
    said: str,
    reports: Sequence[int],
    ranks_run: str | None = None,
) -> Figures:
    """A run that is struck while it steps, or strikes itself: AssertionError unless it ends as asked.

    Args:
        said: a part of its messages.
        reports: the ranks that leave a crash report.
        ranks_run: a module of this folder that the ranks run in place of `dist_qft`.
    """
    changes = (f"sharding.timeout_seconds={_TIMEOUT_SECONDS}", "train.max_steps=5000", "checkpoint.save_steps=2")
    words, run = here.settings("qahira", name, *changes, "checkpoint.save_total_limit=3"), here.folder / name
    program, environment = launcher_of(ranks_run, Path(__file__).parent) if ranks_run else (None, {})
    ranks = here.asked.ranks
    with here.started("train", *words, ranks=ranks, program=program, environment=environment) as command:
        stepping(command, run, random.Random(0))
        processes = [command.rank(rank) for rank in range(ranks)] if ranks_run is None else []
        act(command)
        started = time.time()
        outcome = command.finish(PATIENCE)
        seconds = time.time() - started
    found = {"exit code": outcome.code, "last line": last_line(outcome), "seconds until the end": seconds}
    files = [run / CRASH_FOLDER / f"rank-{rank}.txt" for rank in reports]
    missing = [file.name for file in files if not file.is_file()]
    if outcome.code != code or said not in outcome.err or missing:
        raise AssertionError(f"{found}, without reports {missing}: {outcome.err[-500:]}")
    written = max(file.stat().st_mtime for file in files) - started
    found["seconds until the last report"] = written
    limit = _TIMEOUT_SECONDS + _MORE_SECONDS
    # The launcher wakes a rank that was stopped, which may wait once more.
    if written > limit or seconds > limit + _TIMEOUT_SECONDS or psutil.wait_procs(processes, timeout=5)[1]:
        raise AssertionError(f"too late, or with ranks left behind: {found}")
    if torn := [str(path) for path in list_checkpoints(run) if fault_in(path)]:
        raise AssertionError(f"torn checkpoints: {torn}")
    return found


def killed(here: Place) -> Figures:
    """`kill -9` of the last rank: the launcher names it, and the others leave a report."""
    last = here.asked.ranks - 1
    return ended(here, "killed", kill_last, code=128 + signal.SIGKILL, said=f"rank {last} is gone", reports=range(last))


def halted(here: Place) -> Figures:
    """A rank that is stopped and never answers: all others name it after `sharding.timeout_seconds`."""
    others = [rank for rank in range(here.asked.ranks) if rank != 1]

    def stop(command: Command) -> None:
        command.rank(1).send_signal(signal.SIGSTOP)

    return ended(here, "halted", stop, code=4, said="rank 1 does not answer", reports=others)


def one_error(here: Place) -> Figures:
    """An unexpected error of one rank alone: its own message and exit code, and its crash report."""
    found = ended(here, "one-error", nothing, code=1, said=struck.SAID, reports=(struck.RANK,), ranks_run="struck")
    report = here.folder / "one-error" / CRASH_FOLDER / f"rank-{struck.RANK}.txt"
    if f"RuntimeError: {struck.SAID}" not in report.read_text():
        raise AssertionError(f"another report: {report.read_text()[:300]}")
    return found


def full_disk(here: Place) -> Figures:
    """A disk with room for two checkpoints and a half, which rank 0 fills: exit code 3, and whole checkpoints."""
    if shutil.which("unshare") is None:
        return {"skipped": "no unshare to make a disk with"}
    run, ranks = here.folder / "full", here.asked.ranks
    whole = here.trained("qahira", f"exact-{ranks}", *EXACT, ranks=ranks)
    words = here.settings("qahira", "full", *EXACT, "train.max_steps=5000", "checkpoint.save_steps=2")
    with here.started("train", *words, ranks=ranks, wrapper=on_disk(FULL_DISK, run, whole)) as command:
        outcome = command.finish(PATIENCE)
    if outcome.code == NO_MOUNTS:
        return {"skipped": f"no disks of one's own here: {last_line(outcome)}"}
    saved = list_checkpoints(run.with_name("full.left"))
    if outcome.code != 3 or outcome.err.count("error: rank 0: ") != 1 or not saved or any(map(fault_in, saved)):
        raise AssertionError(f"exit code {outcome.code}, checkpoints {saved}: {outcome.err[-500:]}")
    return {"exit code": outcome.code, "last line": last_line(outcome), "checkpoints": len(saved)}


def started_again(here: Place) -> Figures:
    """A rank is killed under `--max-restarts 2`: the ranks start again, and the adapter is that of a run in peace."""
    ranks = here.asked.ranks
    changes = (*EXACT, f"train.max_steps={_LONG}", f"checkpoint.save_steps={_EVERY}", "checkpoint.save_total_limit=20")
    peace = here.trained("qahira", "in-peace", *changes, ranks=ranks)
    words = here.settings("qahira", "again", *changes)
    with here.started("train", *words, ranks=ranks, environment={"PET_MAX_RESTARTS": "2"}) as command:
        stepping(command, here.folder / "again", random.Random(0))
        kill_last(command)
        started = time.monotonic()
        outcome = command.finish(PATIENCE)
        seconds = time.monotonic() - started
    if outcome.code or "starting again" not in outcome.err or "resuming from " not in outcome.err:
        raise AssertionError(f"exit code {outcome.code}: {outcome.err[-500:]}")
    if adapter_of(here.folder / "again") != adapter_of(peace):
        raise AssertionError("another adapter after the restart")
    return {"adapter": "the same", "seconds from the kill to the end": seconds}


PARTS: dict[str, Callable[[Options], Figures]] = {
    "a rank that is killed": with_runs(not_quick(killed)),
    "a rank that is stopped": with_runs(not_quick(halted)),
    "an error on one rank": with_runs(one_error),
    "a full disk": with_runs(not_quick(full_disk)),
    "a restart after a killed rank": with_runs(not_quick(started_again)),
}
