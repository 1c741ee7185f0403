"""The plan of a run: parameters, bytes held and bytes moved, computed from shapes alone.

No process group is needed: the base is built on the meta device from its configuration. The names and shapes in its
files are compared with it where they are on this machine. Of a base that comes quantized a few rows are read, to tell
the error of another format; of no other base is a weight read. The plan (`training.run_plan`) is printed as tables or
as JSON (`training.plan_tables`). Counts are exact; activations in the peak memory, and times, are estimates. Steps per
epoch, which depend on the data set, are not in it.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor

from dist_qft.base_model.family import rope_warnings
from dist_qft.base_model.model_tensors import check_names
from dist_qft.base_model.requantization import requantization_notes
from dist_qft.base_model.skeleton import BaseModel, build_skeleton
from dist_qft.base_model.weight_files import local_source
from dist_qft.config.check import accumulation_steps, config_warnings
from dist_qft.config.schema import RunConfig, TrainConfig
from dist_qft.data.sources import missing_data
from dist_qft.errors import UserError
from dist_qft.methods.reference import require_reference
from dist_qft.methods.specs import make_spec
from dist_qft.methods.trainable import TrainableSpec
from dist_qft.quant.contract import Format
from dist_qft.quant.frozen import FrozenWeight
from dist_qft.ranks.device import compute_dtype, dtype_name, planned_device
from dist_qft.sharding.engine import Engine, parameter_owners
from dist_qft.sharding.engines import engine_of, engine_warnings
from dist_qft.training.links import Placement, Traffic, between_nodes
from dist_qft.training.machine import Machine
from dist_qft.training.memory_plan import MemoryPlan, chosen_group
from dist_qft.training.optimizer import checkpoint_bytes, require_lr_groups, warmup_steps
from dist_qft.training.planned_activations import tokens_per_micro_batch
from dist_qft.training.planned_reduction import PlannedReduction
from dist_qft.training.run_plan import PlannedBatch, PlannedModel, PlannedOptimization, RunPlan
from dist_qft.training.step_time import StepWork, step_seconds
from dist_qft.tuned_model.task import head_outputs, head_parameters, trainable_names


def planned_base(config: RunConfig) -> BaseModel:
    """The base on the meta device, with notes on its files."""
    dtype = compute_dtype(config.train.precision, planned_device(config.sharding.device))
    base = build_skeleton(config.model, config.quantization, dtype)
    base.notes += _notes_on_files(config, base)
    return base


def require_fit(plan: RunPlan) -> None:
    """UserError, with the cheapest change that would help, if a plan needs more than the memory of a rank."""
    if plan.fits is not False:
        return
    assert plan.memory_limit is not None, "a plan without a limit fits"
    helps = f"it would fit with {plan.remedy}" if plan.remedy else "no change of settings is known with which it fits"
    raise UserError(
        f"memory: got {plan.memory_limit / 2**30:.2f} GiB per rank, must be {plan.peak_bytes / 2**30:.2f} GiB; {helps}"
    )


def make_plan(
    config: RunConfig,
    world_size: int,
    ranks_per_node: int | None = None,
    *,
    memory: int | None = None,
    machine: Machine | None = None,
    base: BaseModel | None = None,
) -> RunPlan:
    """The plan of `config` on `world_size` ranks.

    Args:
        ranks_per_node: all of them by default.
        memory: bytes that a rank may use; None for no limit.
        machine: figures from which the time of a step follows.
        base: the skeleton of this model and quantization if it is there already.

    Raises:
        UserError: unknown model, a shape that a format or adapter cannot hold, a selection that matches no layer,
            or a batch or shard groups that do not divide over the ranks.
    """
    accumulation = accumulation_steps(config, world_size)
    base = base or planned_base(config)
    if config.data is not None:
        base.require_positions(config.data.max_length)
    spec = _spec(config, base)
    trainable = spec.parameters + head_parameters(config.task, base)
    tensors = _base_tensors(base)
    engine = engine_of(config)
    needed = MemoryPlan(base, trainable, spec.backward_through_base)
    place = Placement(world_size, ranks_per_node or world_size, world_size)
    group = chosen_group(config, needed, place, memory)
    place = replace(place, group_size=group)
    counts, reduction = spec.counts(base), PlannedReduction(config, trainable, world_size, accumulation)
    plan = RunPlan(
        model=_model(config, base),
        method=config.method.name,
        engine=engine.name,
        world_size=world_size,
        nodes=world_size // place.ranks_per_node,
        shard_group=group,
        trainable_parameters=trainable,
        trainable_parameters_by_layer_type=counts.by_part,
        trainable_parameters_by_depth=counts.by_depth,
        trainables=spec.title,
        adapters=counts.rows,
        base_bytes=sum(tensor.nbytes for tensor in tensors),
        base_bytes_per_rank=sum(engine.part_bytes(tensor, group) for tensor in tensors),
        base_formats=_format_rows(base),
        **_traffic(config, base, spec, place, reduction),
        optimizer_bytes=reduction.optimizer_bytes,
        optimizer_ranks=world_size if reduction.spread else 1,
        checkpoint_bytes=checkpoint_bytes(config.train, trainable),
        batch=_batch(config, accumulation),
        optimization=_optimization(config.train),
        warnings=_warnings(config, spec, base),
        **_memory(needed, config, place, memory),
    )
    return plan if machine is None else _with_times(plan, config, needed, machine, through=spec.backward_through_base)


def _traffic(
    config: RunConfig, base: BaseModel, spec: TrainableSpec[Any], place: Placement, reduction: PlannedReduction
) -> dict[str, Any]:
    """The fields of a plan that are about bytes moved."""
    engine, accumulation = engine_of(config), accumulation_steps(config, place.world_size)
    passes = int(spec.backward_through_base) + int(engine.gathers_in_backward)  # that gather the layers
    head = head_outputs(config.task) == 0 and not base.tied  # gathered beside the embedding
    gathered = _gather_bytes(base, engine, place.group_size, passes=passes, head=head)
    traffic = Traffic(gathered, reduction.buffer_bytes, accumulation, config.sharding.gradient_sum == "invariant")
    return {
        "gather_bytes_per_micro_batch": gathered,
        "gather_bytes_per_step": gathered * accumulation,
        "reduce_bytes_per_step": reduction.buffer_bytes,
        "collective_bytes_per_step": reduction.collectives(),
        "between_nodes": between_nodes(place, traffic),
    }


def _memory(needed: MemoryPlan, config: RunConfig, place: Placement, limit: int | None) -> dict[str, Any]:
    """The fields of a plan that are about memory."""
    parts = needed.parts(config, place.world_size, place.group_size)
    peak = sum(parts.values())
    fits = None if limit is None else peak <= limit
    remedy = needed.remedy(config, place, limit) if limit is not None and not fits else None
    loading = needed.load_peak(parts, planned_device(config.sharding.device).type)
    fields = {"memory": parts, "peak_bytes": peak, "load_peak_bytes": loading}
    return {**fields, "memory_limit": limit, "fits": fits, "remedy": remedy}


def _with_times(plan: RunPlan, config: RunConfig, memory: MemoryPlan, machine: Machine, *, through: bool) -> RunPlan:
    """The plan with the seconds of a step on `machine`."""
    train, ranks = config.train, plan.world_size
    work = StepWork(
        tokens=tokens_per_micro_batch(config),
        row=config.data.max_length if config.data else 0,
        accumulation=plan.batch.accumulation_steps,
        trainable=plan.trainable_parameters,
        backward=through,
        again=1 / train.checkpoint_every_n_layers if train.gradient_checkpointing and through else 0.0,
        gathered=plan.gather_bytes_per_micro_batch,
        gathered_between=plan.between_nodes["gather_bytes_per_micro_batch"],
        reduced_between=plan.between_nodes["reduce_bytes_per_step"],
        reduced=2 * plan.reduce_bytes_per_step * (ranks - 1) // ranks,
        optimizer=3 * 4 * plan.trainable_parameters // plan.optimizer_ranks + 2 * plan.optimizer_bytes,
        ahead=plan.engine == "fsdp",
    )
    return replace(plan, hardware=machine.name, seconds_per_step=step_seconds(machine, memory.sizes, work))


def _spec(config: RunConfig, base: BaseModel) -> TrainableSpec[Any]:
    """The trainables, if the settings that concern them fit. UserError otherwise."""
    spec = make_spec(config, base)
    require_reference(config, base, spec)
    require_lr_groups(config.train, lambda: trainable_names(config.task, spec))
    return spec


def _model(config: RunConfig, base: BaseModel) -> PlannedModel:
    return PlannedModel(
        path=config.model.path,
        type=base.config.model_type,
        decoder_layers=len(base.layers),
        vocab_size=base.vocab_size,
        compute_dtype=dtype_name(base.dtype),
    )


def _batch(config: RunConfig, accumulation: int) -> PlannedBatch:
    return PlannedBatch(
        global_batch_size=config.train.global_batch_size,
        per_device_train_batch_size=config.train.per_device_train_batch_size,
        accumulation_steps=accumulation,
        max_length=config.data.max_length if config.data else None,
        unit={"pairs": "pairs", "pairs-with-prompts": "pairs", "rated-with-kl": "answers", "rated": "answers"}.get(
            config.task.rows, "rows"
        ),
    )


def _warnings(config: RunConfig, spec: TrainableSpec[Any], base: BaseModel) -> list[str]:
    about_data: list[str] = []
    if config.data is not None:
        about_data = rope_warnings(base.config, config.data.max_length) + missing_data(config.data)
    return config_warnings(config) + engine_warnings(config) + spec.warnings(base) + base.notes + about_data


def _notes_on_files(config: RunConfig, base: BaseModel) -> list[str]:
    """Compare the base with its files, where that downloads no weights that are floats; lines to tell the user."""
    source = local_source(config.model)
    if source is None:
        return []
    tensors = check_names(base, source)
    return tensors.notes + requantization_notes(base, tensors)


def _base_tensors(base: BaseModel) -> list[Tensor]:
    return [getattr(module, name) for module, name in parameter_owners(base.units)]


def _gather_bytes(base: BaseModel, engine: Engine, ranks: int, *, passes: int, head: bool) -> int:
    """Bytes that one rank receives for a micro-batch: the tables once, the rest in each of `passes`."""

    def received(tensors: Iterable[Tensor]) -> int:
        return sum(engine.received_bytes(tensor, ranks) for tensor in tensors)

    tables = [received(table.parameters()) for table in base.units.tables]
    rest = received(_base_tensors(base)) - sum(tables)
    return tables[0] + head * tables[-1] + passes * rest


def _optimization(train: TrainConfig) -> PlannedOptimization:
    return PlannedOptimization(
        optim=train.optim,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.lr_scheduler_type,
        max_steps=train.max_steps,
        num_train_epochs=train.num_train_epochs if train.max_steps is None else None,
        warmup_steps=train.warmup_steps if train.max_steps is None else warmup_steps(train, train.max_steps),
        max_grad_norm=train.max_grad_norm,
        weight_decay=train.weight_decay,
    )


def _format_rows(base: BaseModel) -> list[dict[str, Any]]:
    """One row for each format of the base, and one for the tensors that have none (norms, biases)."""
    frozen: dict[Format, list[FrozenWeight]] = {}
    for module in base.weights().values():
        frozen.setdefault(module.format, []).append(module)
    rows = []
    for format, modules in frozen.items():
        rows.append(
            {
                "format": format.describe(),
                "tensors": len(modules),
                "weights": sum(math.prod(module.weight_shape) for module in modules),
                "blocks": sum(format.blocks(module.weight_shape) for module in modules),
                "bytes": sum(format.bytes_of(module.weight_shape, base.dtype.itemsize) for module in modules),
            }
        )
    plain = [
        getattr(module, name)
        for module, name in parameter_owners(base.units)
        if name == "bias" or not isinstance(module, FrozenWeight)
    ]
    total = sum(tensor.numel() for tensor in plain)
    size = sum(tensor.nbytes for tensor in plain)
    rest = {"format": {"name": "norms, biases"}, "tensors": len(plain), "weights": total, "blocks": 0, "bytes": size}
    return [*rows, rest]
