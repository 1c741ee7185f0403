"""The plan of a run: parameters, bytes held and bytes moved, computed from shapes alone.

No process group is needed: the base is built on the meta device from its configuration. The names and shapes in its
files are compared with it where they are on this machine. Of a base that comes quantized a few rows are read, to tell
the error of another format; of no other base is a weight read. The plan (`training.run_plan`) is printed as tables or
as JSON. Counts are exact. Steps per epoch, which depend on the data set, and peak memory, which depends on the
allocator, are not in it.
"""

import json
import math
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from dist_qft.base_model.model_tensors import check_names
from dist_qft.base_model.requantization import requantization_notes
from dist_qft.base_model.skeleton import BaseModel, build_skeleton
from dist_qft.base_model.weight_files import local_source
from dist_qft.config.check import accumulation_steps, config_warnings
from dist_qft.config.schema import RunConfig, TrainConfig
from dist_qft.errors import UserError
from dist_qft.methods.specs import make_spec
from dist_qft.methods.trainable import TrainableSpec
from dist_qft.quant.contract import Format
from dist_qft.quant.frozen import FrozenWeight
from dist_qft.ranks.device import compute_dtype, planned_device
from dist_qft.sharding.engine import Engine, parameter_owners
from dist_qft.sharding.engines import engine_of, engine_warnings
from dist_qft.sharding.shard_group import ranks_in_group
from dist_qft.training.links import Placement, Traffic, between_nodes
from dist_qft.training.optimizer import checkpoint_bytes, optimizer_bytes_per_rank, shards_optimizer
from dist_qft.training.run_plan import PlannedBatch, PlannedModel, PlannedOptimization, RunPlan
from dist_qft.tuned_model.task import head_outputs


def ranks_on_each(nodes: int, world_size: int) -> int:
    """The ranks of each node; UserError if they cannot be equally many."""
    if world_size % nodes:
        raise UserError(f"--nodes: got {nodes}, must divide --world-size {world_size}")
    return world_size // nodes


def make_plan(config: RunConfig, world_size: int, ranks_per_node: int | None = None) -> RunPlan:
    """The plan of `config` on `world_size` ranks; `ranks_per_node` is all of them by default.

    Raises:
        UserError: unknown model, a shape that a format or adapter cannot hold, a selection that matches no layer,
            or a batch or shard groups that do not divide over the ranks.
    """
    accumulation = accumulation_steps(config, world_size)
    dtype = compute_dtype(config.train.precision, planned_device(config.sharding.device))
    base = build_skeleton(config.model, config.quantization, dtype)
    base.notes += _notes_on_files(config, base)
    if config.data is not None:
        base.require_positions(config.data.max_length)
    spec = make_spec(config, base)
    head = head_outputs(config.task) * base.embedding.embedding_dim
    trainable = spec.parameters + head
    tensors = _base_tensors(base)
    engine = engine_of(config)
    ranks_per_node = ranks_per_node or world_size
    group = ranks_in_group(config.sharding.group, world_size, ranks_per_node)
    passes = int(spec.backward_through_base) + int(engine.gathers_in_backward)  # that gather the layers
    head_gathered = head_outputs(config.task) == 0 and not base.tied  # beside the embedding
    gathered = _gather_bytes(base, engine, group, passes=passes, head=head_gathered)
    counts = spec.counts(base)
    return RunPlan(
        model=_model(config, base),
        method=config.method.name,
        engine=engine.name,
        world_size=world_size,
        nodes=world_size // ranks_per_node,
        shard_group=group,
        trainable_parameters=trainable,
        trainable_parameters_by_layer_type=counts.by_part,
        trainable_parameters_by_depth=counts.by_depth,
        trainables=spec.title,
        adapters=counts.rows,
        base_bytes=sum(tensor.nbytes for tensor in tensors),
        base_bytes_per_rank=sum(engine.part_bytes(tensor, group) for tensor in tensors),
        base_formats=_format_rows(base),
        gather_bytes_per_micro_batch=gathered,
        gather_bytes_per_step=gathered * accumulation,
        reduce_bytes_per_step=4 * trainable,
        between_nodes=between_nodes(
            Placement(world_size, ranks_per_node, group),
            Traffic(gathered, 4 * trainable, accumulation, config.sharding.gradient_sum == "invariant"),
        ),
        optimizer_bytes=optimizer_bytes_per_rank(config.train, trainable, world_size),
        optimizer_ranks=world_size if shards_optimizer(config.train, trainable, world_size) else 1,
        checkpoint_bytes=checkpoint_bytes(config.train, trainable),
        batch=_batch(config, accumulation),
        optimization=_optimization(config.train),
        warnings=_warnings(config, spec, base),
    )


def _model(config: RunConfig, base: BaseModel) -> PlannedModel:
    return PlannedModel(
        path=config.model.path,
        type=base.config.model_type,
        decoder_layers=len(base.layers),
        vocab_size=base.vocab_size,
        compute_dtype=str(base.dtype).removeprefix("torch."),
    )


def _batch(config: RunConfig, accumulation: int) -> PlannedBatch:
    return PlannedBatch(
        global_batch_size=config.train.global_batch_size,
        per_device_train_batch_size=config.train.per_device_train_batch_size,
        accumulation_steps=accumulation,
        max_length=config.data.max_length if config.data else None,
    )


def _warnings(config: RunConfig, spec: TrainableSpec[Any], base: BaseModel) -> list[str]:
    return config_warnings(config) + engine_warnings(config) + spec.warnings(base) + base.notes


def _notes_on_files(config: RunConfig, base: BaseModel) -> list[str]:
    """Compare the base with its files, where that downloads no weights that are floats; lines to tell the user."""
    source = local_source(config.model)
    if source is None:
        return []
    tensors = check_names(base, source)
    return tensors.notes + requantization_notes(base, tensors)


def print_plan(plan: RunPlan, *, as_json: bool = False) -> None:
    """Write a plan to standard output: as tables, or as one JSON document and nothing else."""
    if as_json:
        print(json.dumps(plan.to_dict(), indent=2))
        return
    console = Console(highlight=False)
    console.print(_summary_table(plan))
    console.print(_rows_table(plan.trainables, plan.adapters))
    console.print(_rows_table("base", plan.base_formats))
    for warning in plan.warnings:
        console.print(f"warning: {warning}", markup=False, soft_wrap=True)


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
    warmup_steps = train.warmup_steps
    if warmup_steps is None and train.max_steps is not None:
        warmup_steps = math.ceil(train.warmup_ratio * train.max_steps)
    return PlannedOptimization(
        optim=train.optim,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.lr_scheduler_type,
        max_steps=train.max_steps,
        num_train_epochs=train.num_train_epochs if train.max_steps is None else None,
        warmup_steps=warmup_steps,
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


def _summary_table(plan: RunPlan) -> Table:
    model, batch, optimization = plan.model, plan.batch, plan.optimization
    length = f"{optimization.max_steps} steps"
    if optimization.max_steps is None:
        length = f"{optimization.num_train_epochs:g} epochs"
    table = Table(title="plan", title_justify="left", show_header=False)
    for name, value in {
        "model": f"{model.path} ({model.type}, {model.decoder_layers} layers, {model.compute_dtype})",
        "method": f"{plan.method}, {plan.trainable_parameters:,} trainable parameters",
        "ranks": f"{plan.world_size} x {plan.engine}{_groups(plan)}",
        "base": f"{_size(plan.base_bytes)}, {_size(plan.base_bytes_per_rank)} per rank",
        "gathered": f"{_size(plan.gather_bytes_per_micro_batch)} per rank and micro-batch, "
        f"{_size(plan.gather_bytes_per_step)} per step",
        "reduced": f"{_size(plan.reduce_bytes_per_step)} per step",
        **_between_nodes_row(plan),
        "optimizer": f"{optimization.optim}, {_size(plan.optimizer_bytes)} per rank"
        + (f", spread over {plan.optimizer_ranks}" if plan.optimizer_ranks > 1 else ""),
        "checkpoint": _size(plan.checkpoint_bytes),
        "batch": f"{batch.global_batch_size} = {batch.per_device_train_batch_size} x "
        f"{plan.world_size} ranks x {batch.accumulation_steps} accumulation",
        "schedule": f"{length}, learning rate {optimization.learning_rate:g} {optimization.lr_scheduler_type}",
    }.items():
        table.add_row(name, value)
    return table


def _groups(plan: RunPlan) -> str:
    groups = plan.world_size // plan.shard_group
    return f", {groups} groups of {plan.shard_group}" if groups > 1 else ""


def _between_nodes_row(plan: RunPlan) -> dict[str, str]:
    if plan.nodes == 1:
        return {}
    link = plan.between_nodes
    base, gradients = _size(link["gather_bytes_per_micro_batch"]), _size(link["reduce_bytes_per_step"])
    words = f"into each of {plan.nodes}: base {base} per micro-batch, gradients {gradients} per step"
    return {"between nodes": words}


def _rows_table(title: str, rows: list[dict[str, Any]]) -> Table:
    """A table of dictionaries with the same keys: numbers to the right, bytes in units."""
    table = Table(title=title, title_justify="left")
    for key, value in rows[0].items():
        table.add_column(key.replace("_", " "), justify="left" if isinstance(value, str | dict) else "right")
    for row in rows:
        table.add_row(*(_cell(key, value) for key, value in row.items()))
    return table


def _cell(key: str, value: Any) -> str:
    match value:
        case _ if key == "bytes":
            return _size(value)
        case int():
            return f"{value:,}"
        case float():
            return f"{value:g}"
        case list():
            return " x ".join(map(str, value))
        case {"name": name, **settings}:
            return " ".join([name, *(f"{setting}={each}" for setting, each in settings.items())])
    return str(value)


def _size(count: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"
