"""The merge stage of a study's run: write the merged model, load it as its users would, measure it, remove it."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dist_qft.base_model.skeleton import BaseModel
from dist_qft.config.check import merge_obstacle
from dist_qft.config.schema import RunConfig
from dist_qft.data.batches import eval_batches
from dist_qft.errors import UserError
from dist_qft.harness.tasks import TaskRequest, measure
from dist_qft.merge.certificate import Origin
from dist_qft.merge.live_model import LiveModel
from dist_qft.merge.recipe import MergeRequest
from dist_qft.merge.run import export, make_recipe
from dist_qft.merge.targets import checked_request
from dist_qft.methods.adapters.adapter_spec import require_tiles
from dist_qft.methods.trainable import TrainableSpec
from dist_qft.ranks.preemption import StopSignal
from dist_qft.storage.checkpoint import checkpoint_path
from dist_qft.study.stages import MergeStage
from dist_qft.training.training_run import TrainingRun
from dist_qft.tuned_model.held_out import HeldOut, held_out_loss
from dist_qft.tuned_model.loaded_model import open_base
from dist_qft.tuned_model.prompts import date_of

MERGED_FOLDER = "merged"  # in the run's folder


@dataclass(frozen=True)
class Merged:
    """The merged file's figures on the held-out data and on tasks; `seconds` for the merge and its evaluation."""

    path: Path
    held_out: HeldOut
    tasks: dict[str, float]
    seconds: float


def require_mergeable(stage: MergeStage, config: RunConfig, base: BaseModel, spec: TrainableSpec[Any]) -> None:
    """Refuse a merge that cannot work, before any run starts. Raises UserError."""
    if obstacle := merge_obstacle(config):
        raise UserError(obstacle)
    if config.data is None or (config.data.eval is None and not config.data.eval_samples):
        raise UserError("the merged model is measured on data.eval, which is not set")
    make_recipe(_request(stage, Path(config.output_dir)), config, base, require_tiles(spec))


def task_figures(base: BaseModel, run: TrainingRun, tasks: TaskRequest | None) -> dict[str, float]:
    """The figures of a model on tasks of lm-evaluation-harness, as `task/<task>/<metric>`. Collective."""
    if tasks is None:
        return {}
    found = measure(base, run.inputs.tokenizer, run.inputs.device, tasks, date_of(run.config))
    return {f"task/{task}/{name}": value for task, metrics in found.items() for name, value in metrics.items()}


def merge_and_measure(run: TrainingRun, stage: MergeStage, stop: StopSignal, tasks: TaskRequest | None) -> Merged:
    """Merge a trained run's adapters and measure the result. Collective; the live base is not to be used after it."""
    started = time.perf_counter()
    inputs, config, world = run.inputs, run.config, run.world
    assert inputs.data.eval is not None, "refused by `require_mergeable`"
    request = _request(stage, inputs.output_dir)
    live = LiveModel.of(run.parts)
    recipe = make_recipe(request, config, live.base, require_tiles(inputs.spec))
    step = run.result_step
    origin = Origin(config, checkpoint_path(inputs.output_dir, step), step)
    if world.rank == 0:
        request.path.parent.mkdir(parents=True, exist_ok=True)
    export(live, recipe, origin, inputs.tokenizer, inputs.device, stop)
    base = open_base(request.path, inputs.device, precision=config.train.precision)
    batches = eval_batches(inputs.data.eval, config.train.per_device_train_batch_size, world.rank, world.world_size)
    held_out = held_out_loss(base, batches, torch.device(inputs.device), stop=stop, keep_rows=True)
    on_tasks = {f"merged_{name}": value for name, value in task_figures(base, run, tasks).items()}
    return Merged(request.path, held_out, on_tasks, time.perf_counter() - started)


def _request(stage: MergeStage, run: Path) -> MergeRequest:
    """The request of a stage; a result that an earlier try has left is replaced."""
    folder = run / MERGED_FOLDER
    return checked_request(stage.to, None, folder, overwrite=True, requantize=stage.requantize, dtype=stage.dtype)
