"""Run a study: one run after another in this process, sharing the loaded base; or several processes at once.

A run belongs to the process that holds its lock file, which the system releases when a process ends, however it ends.
So the same study may be started as often as there is room for: the processes share the work. A run that was interrupted
goes on from its checkpoint. A run is recorded as failed if it would fail again: bad input, corrupt files, non-finite
numbers, our own bugs. A full disk or a lost peer ends the study instead, to be started again.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from dist_qft.data.sources import require_local_files
from dist_qft.errors import DistQFTError, Preempted, SetupError, UserError
from dist_qft.ranks.activity import Activity
from dist_qft.ranks.collectives import require_same_inputs
from dist_qft.ranks.connection import connect
from dist_qft.ranks.device import device_for
from dist_qft.ranks.launchers import LAUNCHER
from dist_qft.ranks.preemption import StopSignal
from dist_qft.ranks.process import launcher_mark
from dist_qft.ranks.session import errors_reported
from dist_qft.ranks.world import World
from dist_qft.storage.lock import FolderLock
from dist_qft.study.result_file import Result, read_result, result_version, write_result
from dist_qft.study.rows import Expansion
from dist_qft.study.runner import LOG_FILE, Runner
from dist_qft.study.study_run import StudyRun

_POLL_SECONDS = 2.0
_GPUS = "CUDA_VISIBLE_DEVICES"
_LOCK = "study.lock"  # in a run's folder: the process that does it; `run.lock` is the run's own


def run_rows(
    rows: Sequence[StudyRun],
    numbers: Sequence[int],
    *,
    retry_failed: bool,
    further: Callable[[], Expansion] | None = None,
) -> None:
    """Do those of `rows` at the positions `numbers` that are not done yet.

    Args:
        further: all runs that are known by then; called when those at hand are done, until it brings nothing new.

    Raises:
        Preempted: a signal came; the run it met is saved.
        UserError: rows differ in what one process group cannot have twice.
        DistQFTError: the machine or a peer failed.
    """
    world = World.from_environment()
    device = _common_device(rows, world)
    # Before the ranks meet, so that all of them see the same: nobody can have begun yet.
    work = _Work(rows, retry_failed)
    todo = work.unseen(rows, numbers)
    if not todo:
        return
    timeout = rows[todo[0]].config.sharding.timeout_seconds
    activity = Activity()
    with StopSignal() as stop, connect(world, device, timeout, activity) as peers:
        stop.hold()
        runner = Runner(world, device, stop, peers, activity)
        while todo:
            idle = True
            for number in todo:
                row = rows[number]
                with _claimed(row, world) as mine:
                    if mine and (world.world_size > 1 or work.wants(row)):
                        idle = False
                        result = runner.run(row)
                        if world.rank == 0:
                            write_result(row.folder, result)
                            _tell(number, len(rows), row, result)
                with errors_reported(peers, row.folder):
                    stopped = stop.any_rank()
                if stopped:
                    raise Preempted("stopped by a signal between two runs; start the study again to go on")
            if further is None:
                return
            dist.barrier()  # rank 0 has written the results that decide which runs there are
            known = further()
            rows = known.rows
            if known.waiting and world.world_size == 1:
                # Other processes are at the runs that decide on these: stay for those, and for theirs if they end.
                work.forget(rows)
                if idle:
                    time.sleep(_POLL_SECONDS)
            todo = work.unseen(rows, range(len(rows)))
            require_same_inputs({"runs to do": " ".join(rows[number].name for number in todo)}, device)


class _Work:
    """The runs that are to be done: those without a result, and if asked for those that had failed when this began."""

    def __init__(self, rows: Sequence[StudyRun], retry_failed: bool) -> None:
        self._seen: set[str] = set()
        known = [(row, read_result(row.folder)) for row in rows if retry_failed]
        self._failed = {row.name: result_version(row.folder) for row, result in known if result and result.exit_code}

    def wants(self, row: StudyRun) -> bool:
        """True if a run is still to be done; another process may have done it, or have failed once more."""
        if row.name in self._failed and self._failed[row.name] == result_version(row.folder):
            return True
        return wanted(row, retry_failed=False)

    def unseen(self, rows: Sequence[StudyRun], numbers: Sequence[int]) -> list[int]:
        """Those of `numbers` whose runs are still to be done, each run once; from now on they have been seen."""
        todo = []
        for number in numbers:
            row = rows[number]
            if row.name not in self._seen and self.wants(row):
                self._seen.add(row.name)
                todo.append(number)
        return todo

    def forget(self, rows: Sequence[StudyRun]) -> None:
        """Look again at the runs that have no result, which another process has claimed."""
        self._seen -= {row.name for row in rows if wanted(row, False)}


def run_apart(rows: Sequence[StudyRun]) -> list[Result]:
    """Do these rows one after another in this process and return their results, which are not written down."""
    world = World.from_environment()
    device, activity = _common_device(rows, world), Activity()
    timeout = rows[0].config.sharding.timeout_seconds
    with StopSignal() as stop, connect(world, device, timeout, activity) as peers:
        stop.hold()
        runner = Runner(world, device, stop, peers, activity)
        return [runner.run(row) for row in rows]


def require_data(rows: Sequence[StudyRun], *, retry_failed: bool) -> None:
    """Refuse files of training or held-out text that are missing, before any of the runs that are to be done starts."""
    parts = {}
    for row in rows:
        data = row.config.data
        if data is None or not wanted(row, retry_failed):
            continue
        for key, dataset in data.all_sets().items():
            parts[key, dataset.path] = dataset
    for (key, _), dataset in parts.items():
        require_local_files(dataset, key)


def run_in_processes(study_file: Path, jobs: int, *, retry_failed: bool) -> None:
    """The same study in `jobs` processes at once. An error that ended one of them ends here with its exit code."""
    command = [sys.executable, "-m", "dist_qft", "study", str(study_file), "--no-report"]
    command += ["--retry-failed"] if retry_failed else []
    with StopSignal(end_at_once=False) as stop:
        # They end with this process, however it ends.
        processes = [subprocess.Popen(command, env=env | {LAUNCHER: launcher_mark()}) for env in environments(jobs)]
        stop.hold()
        asked = False
        while running := [process for process in processes if process.poll() is None]:
            if stop.hurried:
                for process in running:
                    process.kill()
                raise KeyboardInterrupt
            if stop.requested and not asked:
                asked = True
                for process in running:
                    process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                running[0].wait(timeout=0.2)
    codes = [process.returncode for process in processes if process.returncode != 0]
    if codes:
        error = DistQFTError(f"{len(codes)} of {jobs} processes ended early; start the study again to go on")
        error.exit_code = codes[0] if codes[0] > 0 else 128 - codes[0]
        raise error


def environments(jobs: int) -> list[dict[str, str]]:
    """The variables of each of so many processes: they share this one's cores, and have its GPUs in turn."""
    shown = os.environ.get(_GPUS)
    gpus = list(map(str, range(torch.cuda.device_count()))) if shown is None else shown.split(",")
    threads = {"OMP_NUM_THREADS": str(threads_of(jobs))}
    return [{**threads, **os.environ, **({_GPUS: gpus[i % len(gpus)]} if gpus else {})} for i in range(jobs)]


def threads_of(jobs: int) -> int:
    """CPU threads of each of so many processes at once."""
    return max(1, len(os.sched_getaffinity(0)) // jobs)


def wanted(row: StudyRun, retry_failed: bool) -> bool:
    """True if a run is still to be done."""
    result = read_result(row.folder)
    return result is None or (retry_failed and result.exit_code != 0)


@contextlib.contextmanager
def _claimed(row: StudyRun, world: World) -> Iterator[bool]:
    """Yield True if this process holds the run's lock file. A job of several ranks takes no lock."""
    if world.world_size > 1:
        yield True
        return
    try:
        row.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"output_dir: cannot write to '{row.folder}': {error.strerror}") from error
    try:
        lock = FolderLock.acquire(row.folder / _LOCK, f"study run '{row.folder}'")
    except UserError:  # another process does it
        yield False
        return
    with lock:
        yield True


def _common_device(rows: Sequence[StudyRun], world: World) -> torch.device:
    """The device of all runs of a study: one process group serves them all."""
    for key in ("device", "timeout_seconds"):
        values = sorted({str(getattr(row.config.sharding, key)) for row in rows})
        if len(values) > 1:
            raise UserError(f"sharding.{key}: got {' and '.join(values)}, one study can have one only")
    return device_for(world, rows[0].config.sharding.device)


def _tell(number: int, count: int, row: StudyRun, result: Result) -> None:
    if result.exit_code:
        outcome = f"failed with exit code {result.exit_code}: {result.error}"
    elif result.tuned:
        merged = f", merged {result.tuned['merged_loss']:.4f}" if "merged_loss" in result.tuned else ""
        losses = f"{result.base['loss']:.4f} -> {result.tuned['loss']:.4f}{merged}"
        outcome = f"held-out loss {losses}, {result.seconds:.0f} s"
    else:
        loss = f"training loss {result.history[-1]:.4f}, " if result.history else ""
        outcome = f"{loss}{result.seconds:.0f} s"
    print(f"[{number}] of {count}  {row.name}  {row}: {outcome}", file=sys.stderr, flush=True)


def outcome_of(row: StudyRun) -> int:
    """The exit code of a run that has been done. UserError if it has not: another process is at it."""
    result = read_result(row.folder)
    if result is None:
        raise UserError(f"{row.name} is being run by another process (process id of this one: {os.getpid()})")
    if result.exit_code:
        print(f"error: {row.name}: {result.error}; see {row.folder / LOG_FILE}", file=sys.stderr)
    return result.exit_code
