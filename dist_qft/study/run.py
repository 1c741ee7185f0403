"""Run a study: one run after another in this process, sharing the loaded base; or several processes at once.

A run belongs to the process that holds its lock file, which the system releases when a process ends, however it ends.
So the same study may be started as often as there is room for: the processes share the work. A run that was interrupted
goes on from its checkpoint. A run is recorded as failed if it would fail again: bad input, corrupt files, non-finite
numbers, our own bugs. A full disk or a lost peer ends the study instead, to be started again.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dist_qft.data.sources import require_local_files
from dist_qft.errors import DistQFTError, PeerLostError, Preempted, SetupError, UserError
from dist_qft.ranks.activity import Activity
from dist_qft.ranks.collectives import require_same_inputs
from dist_qft.ranks.connection import connect
from dist_qft.ranks.device import device_for
from dist_qft.ranks.launchers import LAUNCHER
from dist_qft.ranks.peers import Peers
from dist_qft.ranks.preemption import StopSignal
from dist_qft.ranks.process import launcher_mark
from dist_qft.ranks.session import errors_reported
from dist_qft.ranks.world import World
from dist_qft.storage.atomic import remove_folder
from dist_qft.storage.checkpoint import list_checkpoints
from dist_qft.storage.lock import FolderLock
from dist_qft.storage.trainer_state import BaseEvaluation
from dist_qft.study.results import Result, read_result, write_result
from dist_qft.study.rows import StudyRun
from dist_qft.train import execute_run, gather_inputs
from dist_qft.training.run_inputs import LoadedBase

if TYPE_CHECKING:
    from dist_qft.training.training_run import TrainingRun

LOG_FILE = "log.txt"
_LOCK = "study.lock"  # in a run's folder: the process that does it; `run.lock` is the run's own


def run_rows(rows: Sequence[StudyRun], numbers: Sequence[int], *, retry_failed: bool) -> None:
    """Do those of `rows` at the positions `numbers` that are not done yet.

    Raises:
        Preempted: a signal came; the run it met is saved.
        UserError: rows differ in what one process group cannot have twice.
        DistQFTError: the machine or a peer failed.
    """
    world = World.from_environment()
    device = _common_device(rows, world)
    # Before the ranks meet, so that all of them see the same: nobody can have begun yet.
    todo = [number for number in numbers if _wanted(rows[number], retry_failed)]
    if not todo:
        return
    timeout = rows[todo[0]].config.sharding.timeout_seconds
    activity = Activity()
    with StopSignal() as stop, connect(world, device, timeout, activity) as peers:
        stop.hold()
        runner = _Runner(world, device, stop, peers, activity)
        for number in todo:
            row = rows[number]
            with _claimed(row, world) as mine:
                if not mine or (world.world_size == 1 and not _wanted(row, retry_failed)):
                    continue
                result = runner.run(row)
                if world.rank == 0:
                    write_result(row.folder, result)
                    _tell(number, len(rows), row, result)
            if stop.requested:
                raise Preempted("stopped by a signal between two runs; start the study again to go on")


def require_data(rows: Sequence[StudyRun], *, retry_failed: bool) -> None:
    """Refuse files of training or held-out text that are missing, before any of the runs that are to be done starts."""
    parts = {}
    for row in rows:
        data = row.config.data
        if data is None or not _wanted(row, retry_failed):
            continue
        for key, dataset in {**data.train_sets(), **data.eval_sets()}.items():
            parts[key, dataset.path] = dataset
    for (key, _), dataset in parts.items():
        require_local_files(dataset, key)


def run_in_processes(study_file: Path, jobs: int, *, retry_failed: bool) -> None:
    """The same study in `jobs` processes at once. An error that ended one of them ends here with its exit code."""
    command = [sys.executable, "-m", "dist_qft", "study", str(study_file), "--no-report"]
    command += ["--retry-failed"] if retry_failed else []
    with StopSignal(end_at_once=False) as stop:
        env = os.environ | {LAUNCHER: launcher_mark()}  # they end with this process, however it ends
        processes = [subprocess.Popen(command, env=env) for _ in range(jobs)]
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


def _wanted(row: StudyRun, retry_failed: bool) -> bool:
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


class _Runner:
    """A runner of rows in this process, which keeps the base between those that can share it."""

    def __init__(self, world: World, device: torch.device, stop: StopSignal, peers: Peers, activity: Activity) -> None:
        self._world, self._device, self._stop = world, device, stop
        self._peers, self._activity = peers, activity
        self._loaded: LoadedBase | None = None
        self._key = ""
        self._evaluations: dict[str, BaseEvaluation] = {}

    def run(self, row: StudyRun) -> Result:
        """One run from wherever it stands to its end, well or not."""
        started = time.perf_counter()
        if row.base_key != self._key:
            self._loaded, self._key, self._evaluations = None, row.base_key, {}
        row.folder.mkdir(parents=True, exist_ok=True)
        with open(row.folder / LOG_FILE, "a", encoding="utf-8") as log, contextlib.redirect_stderr(log):
            try:
                run = self._train(row)
            except (SetupError, PeerLostError, Preempted):
                raise
            except Exception as error:
                self._loaded, self._key = None, ""  # its trainables may still be on it
                traceback.print_exc()
                code = error.exit_code if isinstance(error, DistQFTError) else 1
                text = str(error).splitlines()[0] if str(error) else type(error).__name__
                return Result.failed(row, code, text)
        return Result.of_run(row, run, time.perf_counter() - started)

    def _train(self, row: StudyRun) -> "TrainingRun":
        config = row.config
        # A summary of the whole run stands for its results; without them the run is begun anew.
        inputs = gather_inputs(config, "auto", self._world, self._device, self._loaded_for(row))
        if inputs.finished:
            for path in list_checkpoints(row.folder):
                remove_folder(path)
            inputs = gather_inputs(config, "auto", self._world, self._device, self._loaded_for(row))
        with errors_reported(self._peers, row.folder):
            require_same_inputs(inputs.must_match(), self._device)
            run = execute_run(inputs, self._stop, self._activity)
        assert run is not None, "the checkpoints of a finished run are gone, so there was work to do"
        if run.flat.count != row.trainables:
            raise AssertionError(f"{row.name} trains {run.flat.count} values, the formula says {row.trainables}")
        self._keep_base(row, run)
        if self._world.rank == 0:
            for path in list_checkpoints(row.folder):
                remove_folder(path)
        return run

    def _loaded_for(self, row: StudyRun) -> LoadedBase | None:
        if self._loaded is None:
            return None
        # The bare base's answers to prompts are not kept: a run that wants them evaluates it again.
        known = None if row.config.evaluation.prompts else self._evaluations.get(_evaluation_key(row))
        loaded = self._loaded
        return LoadedBase(loaded.tokenizer, loaded.base, loaded.source, loaded.engine, known)

    def _keep_base(self, row: StudyRun, run: "TrainingRun") -> None:
        if run.state.base_eval is not None:
            self._evaluations[_evaluation_key(row)] = run.state.base_eval
        if row.base_key != row.config.output_dir:
            run.parts.trainables.detach()
            inputs, parts = run.inputs, run.parts
            self._loaded = LoadedBase(inputs.tokenizer, parts.base, inputs.source, parts.engine, None)


def _evaluation_key(row: StudyRun) -> str:
    """A key that is equal for runs that evaluate a base on the same data in the same way."""
    parts = row.config.model_dump(include={"data", "task"})
    return json.dumps([parts, row.config.train.per_device_train_batch_size], sort_keys=True)


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
        outcome = f"held-out loss {result.base['loss']:.4f} -> {result.tuned['loss']:.4f}, {result.seconds:.0f} s"
    else:
        outcome = f"training loss {result.history[-1]:.4f}, {result.seconds:.0f} s"
    print(f"[{number}] of {count}  {row.name}  {row}: {outcome}", file=sys.stderr, flush=True)


def outcome_of(row: StudyRun) -> int:
    """The exit code of a run that has been done. UserError if it has not: another process is at it."""
    result = read_result(row.folder)
    if result is None:
        raise UserError(f"{row.name} is being run by another process (process id of this one: {os.getpid()})")
    if result.exit_code:
        print(f"error: {row.name}: {result.error}; see {row.folder / LOG_FILE}", file=sys.stderr)
    return result.exit_code
