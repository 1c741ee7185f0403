"""`dist-qft lm-eval`: tasks of lm-evaluation-harness on a run, beside its base, or on a model."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dist_qft.base_model.tokenizer import load_tokenizer
from dist_qft.config.schema import ModelConfig, RunConfig, ShardingConfig
from dist_qft.errors import UserError
from dist_qft.harness.tasks import Figures, TaskRequest, measure, require_tasks
from dist_qft.ranks.session import session
from dist_qft.storage.atomic import write_json
from dist_qft.trackers.fan_out import Trackers
from dist_qft.trackers.kinds import TENSORBOARD, chosen, trackers_in
from dist_qft.training.event_files import EVENTS_FOLDER
from dist_qft.training.summary import SUMMARY_FILE
from dist_qft.tuned_model.checkpointed import find_checkpoint, run_folder
from dist_qft.tuned_model.loaded_model import holds_model, open_base
from dist_qft.tuned_model.opened_run import opened_to_answer
from dist_qft.tuned_model.prompts import date_of

_NO_EFFECT = ("tasks", "batch_size")  # of a request, on a task's figures


def run_tasks(path: str, request: TaskRequest, *, base: bool, as_json: bool) -> None:
    """Measure and print, on rank 0; a run's figures also go into its summary and trackers.

    Args:
        path: of a run (its newest checkpoint), a checkpoint or a model.
        base: measure a run's bare base, too.

    Raises:
        SetupError: the harness is not installed.
        UserError: nothing of that kind is at `path`; or a task is unknown, or its data cannot be had.
    """
    if not Path(path).exists():
        raise UserError(f"no file or folder '{path}'")
    is_model = holds_model(Path(path))
    if is_model and base:
        raise UserError(f"--base: '{path}' is a model by itself, it has no adapters to leave out")
    require_tasks(request)
    if is_model:
        _on_model(path, request, as_json)
        return
    step = find_checkpoint(path).state.step
    with opened_to_answer(path, doing="lm-eval", request={"tasks": repr((request, base))}) as run:
        found: dict[str, Figures] = {}
        if base:
            with run.parts.trainables.disabled(), run.parts.answering(run.device, tuned=False):
                found["base"] = measure(run.parts.base, run.tokenizer, run.device, request, date_of(run.config))
        with run.parts.answering(run.device):
            found["tuned"] = measure(run.parts.base, run.tokenizer, run.device, request, date_of(run.config))
        if run.world.rank == 0:
            _record(run_folder(path), run.config, found, request, step)
            _print(found, as_json)


def _on_model(path: str, request: TaskRequest, as_json: bool) -> None:
    """Measure a model, which every rank holds whole; they share the batches."""
    with session(ShardingConfig(), doing="lm-eval", must_match={"tasks": repr(request)}) as (world, device):
        model = open_base(Path(path), device)
        found = {"model": measure(model, load_tokenizer(ModelConfig(path=path)), device, request)}
        if world.rank == 0:
            _print(found, as_json)


def with_figures(
    earlier: Mapping[str, Mapping[str, Any]], found: Mapping[str, Figures], request: TaskRequest, step: int
) -> dict[str, dict[str, Any]]:
    """The summary's `lm_eval` with what was found: base, tuned -> task -> metric -> value; asked -> task -> how.

    All that it had of a task goes: a base's figure beside a tuned one was asked for in the same way.

    Args:
        earlier: the section as it was.
        step: of the checkpoint that was measured.
    """
    tasks = {task for figures in found.values() for task in figures}
    asked = {key: value for key, value in asdict(request).items() if key not in _NO_EFFECT}
    new = {**found, "asked": {task: {"step": step, **asked} for task in sorted(tasks)}}
    left = {which: {task: of[task] for task in of if task not in tasks} for which, of in earlier.items()}
    merged = {which: {**left.get(which, {}), **new.get(which, {})} for which in {**left, **new}}
    return {which: of for which, of in merged.items() if of}


def _record(folder: Path, config: RunConfig, found: dict[str, Figures], request: TaskRequest, step: int) -> None:
    """Add the figures to the run's `summary.json`, if it has one, and to its trackers."""
    path = folder / SUMMARY_FILE
    if path.is_file():
        summary = json.loads(path.read_bytes())
        write_json(path, {**summary, "lm_eval": with_figures(summary.get("lm_eval", {}), found, request, step)})
    values = {
        f"lm_eval/{which}/{task}/{name}": value
        for which, figures in found.items()
        for task, metrics in figures.items()
        for name, value in metrics.items()
    }
    if TENSORBOARD in chosen(config.train.report_to):
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(folder / EVENTS_FOLDER / "lm-eval")) as writer:
            for tag, value in values.items():
                writer.add_scalar(tag, value, step)

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    names, settings = trackers_in(config.train.report_to), config.model_dump(mode="json")
    trackers = Trackers(names, folder, settings, resumed=True, say=say)
    trackers.scalars(step, values)
    trackers.hparams({}, {})
    trackers.close()


def _print(found: dict[str, Figures], as_json: bool) -> None:
    if as_json:
        print(json.dumps(found, indent=1))
        return
    kinds: Sequence[str] = list(found)
    for task in next(iter(found.values())):
        for name in found[kinds[-1]][task]:
            values = "  ".join(f"{which} {found[which][task][name]:.4f}" for which in kinds)
            print(f"{task:24} {name:20} {values}")
