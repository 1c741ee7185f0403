"""A plan as tables on the terminal, or as JSON."""

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from dist_qft.training.run_plan import PlannedBatch, RunPlan


def print_plan(plan: RunPlan, *, as_json: bool = False) -> None:
    """Write a plan to standard output: as tables, or as one JSON document and nothing else."""
    if as_json:
        print(json.dumps(plan.to_dict(), indent=2))
        return
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(_summary_table(plan))
    console.print(_rows_table(plan.trainables, plan.adapters))
    console.print(_rows_table("base", plan.base_formats))
    for warning in plan.warnings:
        console.print(f"warning: {warning}", soft_wrap=True)


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
        **_memory_row(plan),
        **_time_row(plan),
        "batch": f"{batch.global_batch_size}{_unit(batch)} = {batch.per_device_train_batch_size} x "
        f"{plan.world_size} ranks x {batch.accumulation_steps} accumulation",
        "schedule": f"{length}, learning rate {optimization.learning_rate:g} {optimization.lr_scheduler_type}",
    }.items():
        table.add_row(name, value)
    return table


def _memory_row(plan: RunPlan) -> dict[str, str]:
    parts = ", ".join(f"{name} {_size(size)}" for name, size in plan.memory.items() if size)
    limit = "" if plan.memory_limit is None else f" of {_size(plan.memory_limit)}"
    return {"memory": f"{_size(plan.peak_bytes)}{limit} per rank: {parts}"}


def _time_row(plan: RunPlan) -> dict[str, str]:
    if plan.seconds_per_step is None:
        return {}
    step, *rest = (plan.seconds_per_step[name] for name in ("step", "compute", "gather", "reduce", "optimizer"))
    words = "{} s on {}: compute {}, gather {}, reduce {}, optimizer {}"
    return {"step": words.format(_seconds(step), plan.hardware, *map(_seconds, rest))}


def _seconds(seconds: float) -> str:
    return "< 0.001" if 0 < seconds < 0.001 else f"{seconds:.3g}"


def _unit(batch: PlannedBatch) -> str:
    return "" if batch.unit == "rows" else f" {batch.unit}"


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
