"""One run of a study from wherever it stands to its result; the loaded base goes from one run to the next."""

import contextlib
import dataclasses
import gc
import json
import time
import traceback
from typing import TYPE_CHECKING

import torch

from dist_qft.errors import DistQFTError, PeerLostError, Preempted, SetupError, UserError
from dist_qft.ranks.activity import Activity
from dist_qft.ranks.collectives import maximum, on_rank_0, require_same_inputs
from dist_qft.ranks.peers import Peers
from dist_qft.ranks.preemption import StopSignal
from dist_qft.ranks.session import errors_reported
from dist_qft.ranks.world import World
from dist_qft.storage.atomic import remove_folder
from dist_qft.storage.checkpoint import list_checkpoints
from dist_qft.storage.trainer_state import BaseEvaluation
from dist_qft.study.costs import costs_of
from dist_qft.study.merging import MERGED_FOLDER, Merged, merge_and_measure, task_figures
from dist_qft.study.result_file import Result, write_result, write_rows
from dist_qft.study.study_run import StudyRun
from dist_qft.train import execute_run, gather_inputs
from dist_qft.training.run_inputs import LoadedBase, RunInputs
from dist_qft.training.summary import remove_other_summary

if TYPE_CHECKING:
    from dist_qft.training.training_run import TrainingRun

LOG_FILE = "log.txt"


class Runner:
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
            self._loaded, self._key = None, row.base_key
            gc.collect()  # a base and its layers refer to each other: two would be held at once
        row.folder.mkdir(parents=True, exist_ok=True)
        with (
            open(row.folder / LOG_FILE, "a", encoding="utf-8") as log,
            contextlib.redirect_stderr(log),
            contextlib.redirect_stdout(log),
        ):
            try:
                return self._measured(row, started)
            except (SetupError, PeerLostError, Preempted):
                raise
            except Exception as error:
                self._loaded, self._key = None, ""  # its trainables may still be on it
                traceback.print_exc()
                code = error.exit_code if isinstance(error, DistQFTError) else 1
                text = str(error).splitlines()[0] if str(error) else type(error).__name__
                result = Result.failed(row, code, text)
                if not getattr(error, "everywhere", False) and not self._peers.all_failed(row.name):
                    # The others are at this run still and will wait for this rank: it goes, and they notice.
                    write_result(row.folder, result)
                    raise
                return result

    def _measured(self, row: StudyRun, started: float) -> Result:
        """A run trained, merged if the study asks for it, and measured; what nobody keeps is removed."""
        run = self._train(row)
        costs = costs_of(run)
        merged: Merged | None = None
        on_tasks = self._task_figures(run, row)
        if row.merge is None:
            self._keep_base(row, run)
        else:
            self._keep_evaluation(row, run)
            self._loaded, self._key = None, ""  # a merge may change the base for good
            with errors_reported(self._peers, row.folder):
                merged = merge_and_measure(run, row.merge, self._stop, row.tasks)
            costs["merge_seconds"] = round(merged.seconds, 3)
        on_rank_0(lambda: _keep_asked(row, run, merged), self._device)
        figures = on_tasks if merged is None else {**on_tasks, "merged_loss": merged.held_out.loss, **merged.tasks}
        return Result.of_run(row, run, time.perf_counter() - started, figures, costs)

    def _train(self, row: StudyRun) -> "TrainingRun":
        inputs = self._gathered(row)
        if inputs.finished:  # but was stopped before its result was written: no step is left, its end is measured again
            on_rank_0(lambda: remove_other_summary(row.folder, None, 0), self._device)
            inputs = self._gathered(row)
        with errors_reported(self._peers, row.folder):
            run = execute_run(inputs, self._stop, self._activity)
        assert run is not None, "the summary of a finished run is gone, so there was work to do"
        if run.flat.count != row.trainables:
            raise AssertionError(f"{row.name} trains {run.flat.count} values, the formula says {row.trainables}")
        return run

    def _gathered(self, row: StudyRun) -> RunInputs:
        """The inputs of a run, the same on all ranks. If a rank has none, no rank goes on with it. Collective."""
        inputs, failure = None, None
        try:
            inputs = self._inputs(row)
        except Exception as error:
            failure = error
        with errors_reported(self._peers, row.folder):
            failed = maximum(float(inputs is None), torch.device("cpu")) > 0
        if failure is not None:
            raise failure
        if inputs is None or failed:
            raise UserError("another rank could not begin this run, and has said why")
        with errors_reported(self._peers, row.folder):
            require_same_inputs(inputs.must_match(), self._device)
        return inputs

    def _inputs(self, row: StudyRun) -> RunInputs:
        inputs = gather_inputs(row.config, "auto", self._world, self._device, self._loaded)
        # The bare base's answers to prompts are not kept: a run that wants them evaluates it again.
        known = None if row.config.evaluation.prompts else self._evaluations.get(_evaluation_key(row))
        return dataclasses.replace(inputs, base_evaluation=known, keep_rows=True)

    def _task_figures(self, run: "TrainingRun", row: StudyRun) -> dict[str, float]:
        """The trained model's figures on the study's tasks. Training has left the trainables in train mode."""
        if row.tasks is None:
            return {}
        run.doing = "tasks"
        with errors_reported(self._peers, row.folder), run.parts.answering(self._device):
            return task_figures(run.parts.base, run, row.tasks)

    def _keep_evaluation(self, row: StudyRun, run: "TrainingRun") -> None:
        if run.state.base_eval is not None:
            self._evaluations[_evaluation_key(row)] = run.state.base_eval

    def _keep_base(self, row: StudyRun, run: "TrainingRun") -> None:
        self._keep_evaluation(row, run)
        if row.base_key != row.config.output_dir:
            run.parts.detach()
            inputs, parts = run.inputs, run.parts
            self._loaded = LoadedBase(inputs.tokenizer, parts.base, inputs.source, parts.engine)


def _keep_asked(row: StudyRun, run: "TrainingRun", merged: Merged | None) -> None:
    """Write the rows' scores, and remove the results that the study does not keep."""
    tuned = run.evaluations.tuned
    scores = {"tuned": tuned.rows if tuned else {}, "merged": merged.held_out.rows if merged else {}}
    write_rows(row.folder, scores)
    if "adapter" not in row.keep:
        _remove_checkpoints(row)
    if "merged" not in row.keep and merged is not None:
        remove_folder(row.folder / MERGED_FOLDER)


def _remove_checkpoints(row: StudyRun) -> None:
    for path in list_checkpoints(row.folder):
        remove_folder(path)


def _evaluation_key(row: StudyRun) -> str:
    """A key that is equal for runs that evaluate a base on the same data in the same way."""
    parts = row.config.model_dump(include={"data", "task", "model", "quantization"})
    train = row.config.train
    return json.dumps([parts, train.per_device_train_batch_size, train.precision], sort_keys=True)
