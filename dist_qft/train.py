"""A training run, stage by stage, in the order in which it happens. The table of contents of the project.

Everything that can be refused is refused before the base is loaded, and tokenizing happens before the process
group exists, so that no rank waits in a collective for another's slow disk.
"""

import os
import sys
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from dist_qft.base_model.family import rope_warnings
from dist_qft.base_model.model_tensors import check_names
from dist_qft.base_model.requantization import requantization_notes
from dist_qft.base_model.skeleton import build_skeleton
from dist_qft.base_model.tokenizer import run_tokenizer
from dist_qft.base_model.weight_files import open_source
from dist_qft.config.check import accumulation_steps, comparison_warnings, config_warnings
from dist_qft.config.schema import RunConfig
from dist_qft.data.prepare import prepare
from dist_qft.errors import DistQFTError, SetupError, UserError
from dist_qft.merge.certificate import Origin
from dist_qft.merge.live_model import LiveModel
from dist_qft.merge.place import require_free, require_place_at_end, require_room
from dist_qft.merge.run import export, recipe_at_end
from dist_qft.methods.reference import require_reference
from dist_qft.methods.specs import make_spec
from dist_qft.ranks.activity import Activity
from dist_qft.ranks.collectives import on_rank_0
from dist_qft.ranks.device import compute_dtype
from dist_qft.ranks.preemption import StopSignal
from dist_qft.ranks.session import place, session
from dist_qft.ranks.world import World
from dist_qft.sharding.engines import engine_warnings
from dist_qft.sharding.shard_group import ranks_in_group
from dist_qft.storage.checkpoint import (
    checkpoint_path,
    clean_up,
    list_checkpoints,
    require_checkpoint_space,
    require_writable,
)
from dist_qft.storage.lock import RUN_LOCK, FolderLock
from dist_qft.trackers.kinds import require_installed
from dist_qft.training.best_evaluation import continue_evaluations, require_metric, why_stopped
from dist_qft.training.memory_plan import MemoryPlan, automatic_group
from dist_qft.training.optimizer import check_warmup, checkpoint_bytes, require_lr_groups
from dist_qft.training.resume import changed_settings, check_trajectory, choose_checkpoint, resume_after_restart
from dist_qft.training.run_inputs import LoadedBase, RunInputs
from dist_qft.training.summary import remove_other_summary
from dist_qft.training.training_run import TrainingRun
from dist_qft.tuned_model.answer import require_room_for_answers
from dist_qft.tuned_model.assemble import assemble, attach_trainables, start_fresh
from dist_qft.tuned_model.checkpointed import check_adapter, check_fingerprint, check_settings, settings_of, with_date
from dist_qft.tuned_model.prompts import date_of
from dist_qft.tuned_model.task import head_parameters, trainable_names
from dist_qft.tuned_model.warm_start import require_same_model, starting_values, take_values


def run_training(
    config: RunConfig,
    resume: str | None = None,
    stop: StopSignal | None = None,
    at_end: Callable[[], None] = lambda: None,
) -> None:
    """Train from a config to a summary.

    Args:
        resume: None, 'auto' or a checkpoint folder.
        stop: has been entered.
        at_end: is called on rank 0 when the run has come to its end. The other ranks wait for it, since a launcher may
            end the job when the first of them leaves.

    Raises:
        DistQFTError: see `dist_qft.errors`; faults of the input are told before the base is loaded.
    """
    world, device = place(config.sharding)
    activity = Activity()
    with nullcontext(stop) if stop else StopSignal() as stop:
        inputs = gather_inputs(config, resume, world, device)
        must_match, crash_dir = inputs.must_match(), inputs.output_dir
        with session(config.sharding, doing=activity, must_match=must_match, crash_dir=crash_dir, stop=stop):
            execute_run(inputs, stop, activity)
            on_rank_0(at_end, device)


def gather_inputs(
    config: RunConfig, resume: str | None, world: World, device: torch.device, loaded: LoadedBase | None = None
) -> RunInputs:
    """Do everything that needs no other rank: refuse a run that cannot work, tokenize, find the checkpoint.

    `loaded` is a base of the same model, quantization, sharding and precision, to be used instead of loading one.
    """
    # Does the request make sense for this world, and can its results be written?
    accumulation_steps(config, world.world_size)
    ranks_in_group(config.sharding.group, world.world_size, world.local_world_size)
    if config.data is None:
        raise UserError("data: training needs data.train")
    output_dir = _place_of_results(config, world)
    existing = tuple(path.name for path in list_checkpoints(output_dir))
    resume = resume_after_restart(output_dir, resume, os.environ)
    checkpoint, notes = choose_checkpoint(output_dir, resume)
    notes += [f"warning: {warning}" for warning in config_warnings(config) + engine_warnings(config)]

    # The model's shape and the spec of the trainables; no weight is read.
    dtype = compute_dtype(config.train.precision, device)
    skeleton = loaded.base if loaded else build_skeleton(config.model, config.quantization, dtype)
    skeleton.require_positions(config.data.max_length)
    spec = make_spec(config, skeleton)
    require_reference(config, skeleton, spec)
    require_lr_groups(config.train, lambda: trainable_names(config.task, spec))
    doubts = rope_warnings(skeleton.config, config.data.max_length) + spec.warnings(skeleton)
    notes += [f"warning: {warning}" for warning in doubts]
    trainable = spec.parameters + head_parameters(config.task, skeleton)
    require_checkpoint_space(output_dir, checkpoint_bytes(config.train, trainable))
    start = None
    if checkpoint is not None:
        check_adapter(checkpoint, spec)
    elif config.method.init_from is not None:
        start = starting_values(config.method.init_from, spec, config.task)
        notes.append(f"trainables begin with the values of {start.where}")

    # The tokens.
    tokenizer = loaded.tokenizer if loaded else run_tokenizer(config)
    settings = settings_of(config, skeleton, tokenizer)
    if checkpoint is not None:
        notes += check_settings(checkpoint, config, settings)
    elif start is not None:
        require_same_model(start, settings)
    cache_dir = Path(config.data.cache_dir or output_dir / "data_cache")
    config = with_date(config, tokenizer, checkpoint)
    assert config.data is not None, "a date takes no data away"
    data = prepare(config.data, tokenizer, skeleton.vocab_size, cache_dir, config.task)
    require_metric(config, data.eval)
    require_room_for_answers(config.evaluation, skeleton, tokenizer, date_of(config))
    notes += data.notes() + spec.disk_notes(output_dir, skeleton, data.train)

    # Where the weights are, their names and shapes. Last, because it downloads those of a Hub id.
    source = loaded.source if loaded else open_source(config.model)
    if loaded is None:
        tensors = check_names(skeleton, source)
        notes += tensors.notes + requantization_notes(skeleton, tensors)

    recipe = recipe_at_end(config, skeleton, spec)
    found = (tokenizer, skeleton, source, spec, settings, data, checkpoint, existing, recipe, notes, loaded, start)
    return _checked(RunInputs(config, world, device, *found))


def _place_of_results(config: RunConfig, world: World) -> Path:
    """The run's folder, if checkpoints, figures and merge can be written where the config says."""
    require_place_at_end(config)
    output_dir = Path(config.output_dir)
    require_writable(output_dir)
    require_installed(config.train.report_to if world.rank == 0 else "none")
    return output_dir


def _checked(inputs: RunInputs) -> RunInputs:
    """The inputs, if this run may end where its config says and continue from its checkpoint. UserError otherwise."""
    config, checkpoint = inputs.config, inputs.checkpoint
    if checkpoint is not None:
        inputs.notes.extend(continue_evaluations(checkpoint.state, config, inputs.data.held_out_digest))
    if inputs.recipe is not None and not inputs.finished:
        require_free(inputs.recipe.request)
        require_room(inputs.recipe, inputs.skeleton)
    total_steps, _ = inputs.length()
    check_warmup(config.train, total_steps)
    if config.train.max_steps is None:  # or the config's own check has said it
        inputs.notes.extend(f"warning: {warning}" for warning in comparison_warnings(config, total_steps))
    if checkpoint is not None:
        check_trajectory(checkpoint, config, inputs.data.train.digest, total_steps)
        inputs.notes.extend(changed_settings(checkpoint, config))
    return inputs if inputs.loaded or config.sharding.group != "auto" else _with_group(inputs)


def _with_group(inputs: RunInputs) -> RunInputs:
    """The inputs with the ranks that are to share a base, which `sharding.group: auto` leaves to the plan."""
    config, base, spec = inputs.config, inputs.skeleton, inputs.spec
    trainable = spec.parameters + head_parameters(config.task, base)
    memory = MemoryPlan(base, trainable, spec.backward_through_base)
    group, note = automatic_group(config, memory, inputs.world, inputs.device)
    inputs.notes.append(note)
    return replace(inputs, shard_group=group)


def execute_run(inputs: RunInputs, stop: StopSignal, activity: Activity | None = None) -> TrainingRun | None:
    """Train, and merge if the config asks for it. Collective, in a session; returns None if all was done before."""
    if inputs.finished:
        _tell_finished(inputs)
        return None

    # One run at a time in a folder; rank 0 writes, so it holds the lock.
    lock = on_rank_0(lambda: _lock_folder(inputs), inputs.device)
    with nullcontext() if lock is None else lock:
        # Stream the base through quantization into its shards; hook the trainables on.
        if inputs.loaded is None:
            parts = assemble(inputs.placed(), inputs.skeleton, inputs.spec, inputs.device, inputs.source, stop)
        else:
            parts = attach_trainables(inputs.config, inputs.skeleton, inputs.loaded.engine, inputs.spec, inputs.device)
        if inputs.config.data is not None and inputs.config.data.packing:
            rows = inputs.config.train.per_device_train_batch_size
            parts.base.require_separate_samples(inputs.device, rows)
        if inputs.checkpoint is not None:
            check_fingerprint(inputs.checkpoint, parts.base)
        else:
            start_fresh(parts, inputs.spec, inputs.source)
            if inputs.start is not None:
                take_values(parts, inputs.start)

        # Train, evaluate, save.
        run = TrainingRun(inputs, parts, stop, lock)
        if activity is not None:
            activity.follow(lambda: run.doing)
        with closing(run):
            run.prepare()
            run.evaluate_base()
            run.train()
            run.finish()

            # Fold what was learned into the base and write it, if the config says so.
            if inputs.recipe is not None:
                run.doing = "the merge"
                step = run.result_step
                origin = Origin(inputs.config, checkpoint_path(inputs.output_dir, step), step)
                export(LiveModel.of(parts), inputs.recipe, origin, inputs.tokenizer, inputs.device, stop)
    return run


def _lock_folder(inputs: RunInputs) -> FolderLock:
    """Take the run's folder for this process, and remove another run's summary and what dead processes half wrote.

    Raises:
        UserError: another run works in it.
        SetupError: another run has worked in it since this one looked for its checkpoint.
    """
    output_dir = inputs.output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    lock = FolderLock.acquire(output_dir / RUN_LOCK, f"output_dir: '{output_dir}'")
    try:
        if tuple(path.name for path in list_checkpoints(output_dir)) != inputs.existing:
            raise SetupError(f"output_dir: another run has just written to '{output_dir}'; start this one again")
        clean_up(output_dir)
        state = inputs.checkpoint.state if inputs.checkpoint else None
        remove_other_summary(output_dir, state.run_id if state else None, state.step if state else 0)
    except DistQFTError:
        lock.release()
        raise
    return lock


def _tell_finished(inputs: RunInputs) -> None:
    if inputs.world.rank == 0 and inputs.checkpoint is not None:
        path, state = inputs.checkpoint.path, inputs.checkpoint.state
        done = f"{path} is the last step of this run: nothing to do"
        if state.step < inputs.length()[0]:
            patience = inputs.config.evaluation.early_stopping_patience
            done = f"{path}: {why_stopped(state)}; evaluation.early_stopping_patience is {patience}: nothing to do"
        print(*inputs.notes, done, sep="\n", file=sys.stderr)
