"""`--plan`: the table of a study's runs, their trainables, and the time that they may take.

The time comes from runs of the study that are done and from short trials of the others (`estimate`). Where a run cannot
be tried, for want of its data or model, one decoder layer is timed here, forward and backward, on the real shapes and
format: that tells minutes from hours, not more.
"""

import time
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

from dist_qft.base_model.skeleton import BaseModel, build_skeleton
from dist_qft.config.schema import RunConfig
from dist_qft.quant.frozen import FrozenLinear
from dist_qft.ranks.device import compute_dtype, planned_device
from dist_qft.ranks.world import World
from dist_qft.study.estimate import estimate
from dist_qft.study.groups import THIRDS, TYPES
from dist_qft.study.results import Outcome, collect, distinct
from dist_qft.study.rows import Expansion
from dist_qft.study.settings import Study


def print_plan(study: Study, expansion: Expansion, jobs: int) -> None:
    """Print one line for each run that is known by now, and the time that all will take."""
    outcomes = collect(expansion.rows)
    table = _table(outcomes)
    # As wide as it needs: a table of runs is also read by other programs.
    width = max(80, Console(width=1000, markup=False, emoji=False).measure(table).maximum)
    console = Console(highlight=False, markup=False, emoji=False, width=width)
    console.print(table)
    if study.settings.tune is not None and expansion.waiting:
        console.print(
            f"and {len(expansion.waiting)} runs whose {study.settings.tune.axis} these decide", soft_wrap=True
        )
    runs = distinct(outcomes)
    missing = sum(not outcome.done for outcome in runs) + len(expansion.waiting)
    console.print(f"{len(runs)} runs, {missing} to do; {_time_needed(study, expansion, jobs)}", soft_wrap=True)
    for preset in study.settings.presets:
        if preset.preset == "equal_discount":
            held = "all trainables, so totals are equal" if preset.hold == "absolute" else "the group's own trainables"
            console.print(f"equal_discount: {preset.discount:.0%} of {held} ({preset.hold} cut)", soft_wrap=True)


def _table(outcomes: Sequence[Outcome]) -> Table:
    table = Table(title="runs", title_justify="left")
    groups = [name for name in ("total", *TYPES, *THIRDS) if any(name in o.row.kept for o in outcomes)]
    for name in ("run", *outcomes[0].row.subject, "variant"):
        table.add_column(name, no_wrap=True)
    for name in ("seed", "trainables", *groups):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    for outcome in outcomes:
        row = outcome.row
        table.add_row(
            row.name,
            *row.subject.values(),
            " = ".join(map(str, row.variants)),
            str(row.config.train.seed),
            f"{row.trainables:,}",
            *(f"{row.kept[name]:.1%}" if name in row.kept else "" for name in groups),
            outcome.status,
        )
    return table


def _time_needed(study: Study, expansion: Expansion, jobs: int) -> str:
    """The time that the remaining runs will take, and the basis of that figure."""
    if World.from_environment().world_size == 1 and (known := estimate(study, expansion, jobs)):
        each = known.seconds / max(known.runs, 1)
        at_once = f"{jobs} at a time" if jobs > 1 else "one after another"
        return f"{each:,.0f} s each, {known.seconds / jobs / 60:,.0f} minutes {at_once} ({known.basis})"
    rows = [*expansion.rows, *expansion.waiting]
    steps = rows[0].config.train.max_steps
    if steps is None:
        return "how long they take depends on the data: train.max_steps is not set"
    seconds = _estimate(rows[0].config, steps)
    return (
        f"{seconds:,.0f} s each, {seconds * len(rows) / jobs / 60:,.0f} minutes "
        "(estimated from one decoder layer; training steps only)"
    )


def _estimate(config: RunConfig, steps: int) -> float:
    """Seconds for the training steps of a run, from one decoder layer's linear layers on one micro-batch."""
    device = planned_device(config.sharding.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        device = torch.device("cpu")
    base = build_skeleton(config.model, config.quantization, compute_dtype(config.train.precision, device))
    micro_batch = config.train.per_device_train_batch_size
    tokens = micro_batch * (config.data.max_length if config.data else 1)
    seconds = _layer_seconds(base, tokens, device) * len(base.layers)
    return seconds * steps * config.train.global_batch_size / micro_batch


def _layer_seconds(base: BaseModel, tokens: int, device: torch.device) -> float:
    total = 0.0
    generator = torch.Generator().manual_seed(0)
    for module in base.layers[0].modules():
        if not isinstance(module, FrozenLinear):
            continue
        linear = FrozenLinear(module.in_features, module.out_features, module.format, bias=False, dtype=base.dtype)
        weight = torch.randn(module.out_features, module.in_features, generator=generator)
        for name, values in module.format.quantize(weight).items():
            own = getattr(linear, name)
            setattr(linear, name, torch.nn.Parameter(values.to(device, own.dtype), requires_grad=False))
        x = torch.randn(tokens, module.in_features, generator=generator).to(device, base.dtype).requires_grad_()
        for attempt in range(2):
            started = time.perf_counter()
            y = linear(x)
            y.backward(torch.ones_like(y))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - started
            if attempt:  # the first one pays for what is set up once
                total += seconds
    return total
