"""The end of a training run on each rank of a pool, well or with one of our errors."""

from collections.abc import Callable
from contextlib import closing, redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

import torch

from dist_qft.config.schema import RunConfig
from dist_qft.errors import DistQFTError
from dist_qft.ranks.preemption import StopSignal
from dist_qft.train import execute_run, gather_inputs
from dist_qft.training.metrics_file import StepRecord, read_history
from dist_qft.training.run_inputs import RunInputs
from dist_qft.training.training_run import TrainingRun
from dist_qft.tuned_model.assemble import assemble
from tests.support.whole_runs import pool_world


@dataclass(frozen=True)
class Outcome:
    """`error` is empty if the run ended well; `told_once` says that every rank raised it at the same point.

    `told` is what the rank wrote to its standard error.
    """

    error: str = ""
    exit_code: int = 0
    told_once: bool = True
    data_chain: str = ""
    history_digest: str = ""
    history: tuple[StepRecord, ...] = ()
    told: str = field(default="", compare=False)

    @property
    def losses(self) -> list[float]:
        return [entry.loss for entry in self.history]


def attempt(
    config: RunConfig, resume: str | None = None, disturb: Callable[[TrainingRun], None] | None = None
) -> Outcome:
    """Run on this rank of a pool; `disturb` may put hooks on the run's parts before its first step."""
    run = None
    with redirect_stderr(StringIO()) as told:
        try:
            with StopSignal() as stop:
                inputs = gather_inputs(config, resume, pool_world(), torch.device("cpu"))
                stop.hold()
                run = execute_run(inputs, stop) if disturb is None else _execute_disturbed(inputs, stop, disturb)
        except DistQFTError as error:
            return Outcome(str(error), error.exit_code, error.everywhere, told=told.getvalue())
    if run is None:
        return Outcome(told=told.getvalue())
    return Outcome(
        data_chain=run.state.data_chain,
        history_digest=run.state.history_digest,
        history=tuple(read_history(Path(config.output_dir))),
        told=told.getvalue(),
    )


def _execute_disturbed(inputs: RunInputs, stop: StopSignal, disturb: Callable[[TrainingRun], None]) -> TrainingRun:
    run = TrainingRun(inputs, assemble(inputs.config, inputs.skeleton, inputs.spec, inputs.device), stop)
    with closing(run):
        run.prepare()
        disturb(run)
        run.train()
        run.finish()
    return run
