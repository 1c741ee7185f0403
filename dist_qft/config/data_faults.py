"""Rules between the settings of the sections `data` and `task`, and for the paths in all sections."""

import datetime
from collections.abc import Iterator

from dist_qft.config.data_schema import OF_TASKS, TASK_FORMATS, DataConfig, DatasetConfig
from dist_qft.config.fault import Fault, KeyPath, value_fault
from dist_qft.config.paths import unexpanded
from dist_qft.config.schema import RunConfig
from dist_qft.divisors import either


def data_faults(config: RunConfig) -> Iterator[Fault]:
    """Every broken rule."""
    for key, path in _paths(config).items():
        if path is not None and (reason := unexpanded(path)):
            yield value_fault(key, f"got '{path}', but {reason}")
    if config.data is None:
        return
    yield from _mixture_faults(config.data)
    yield from _format_faults(config, config.data)
    yield from _row_faults(config.data)


def _paths(config: RunConfig) -> dict[KeyPath, str | None]:
    paths: dict[KeyPath, str | None] = {
        ("output_dir",): config.output_dir,
        ("model", "path"): config.model.path,
        ("sharding", "deepspeed_config"): config.sharding.deepspeed_config,
        ("merge", "path"): config.merge.path,
        ("method", "init_from"): config.method.init_from,
    }
    if config.data is not None:
        paths[("data", "cache_dir")] = config.data.cache_dir
        paths |= {(*key, "path"): dataset.path for key, dataset in _datasets(config.data)}
    return paths


def _datasets(data: DataConfig) -> Iterator[tuple[KeyPath, DatasetConfig]]:
    for name, given in (("train", data.train), ("eval", data.eval)):
        if isinstance(given, list):
            for index, dataset in enumerate(given):
                yield ("data", name, index), dataset
        elif given is not None:
            yield ("data", name), given


def _mixture_faults(data: DataConfig) -> Iterator[Fault]:
    train = data.train if isinstance(data.train, list) else []
    weighted = [dataset.weight is not None for dataset in train]
    for key, dataset in _datasets(data):
        if dataset.weight is not None and key[1] == "eval":
            yield value_fault((*key, "weight"), "no effect, every held-out row is used; remove it")
        elif dataset.weight is not None and len(train) < 2:
            yield value_fault((*key, "weight"), "no effect on a single data set; remove it")
        elif key[1] == "train" and len(train) > 1 and dataset.weight is None and any(weighted):
            yield value_fault((*key, "weight"), "missing, must be given for every data set of data.train or for none")


def _format_faults(config: RunConfig, data: DataConfig) -> Iterator[Fault]:
    task = config.task.name
    predicts_labels = config.task.predicts_labels
    for key, dataset in _datasets(data):
        given, own = dataset.format, TASK_FORMATS.get(task, ())
        if given != "auto" and given not in own and (own or given in OF_TASKS):
            wanted = either(list(own)) if own else "another format"
            yield value_fault((*key, "format"), f"got {given}, must be {wanted} with task {task}")
    if predicts_labels and data.template != "chat":
        yield value_fault(("data", "template"), f"task {task} reads texts as they are; remove it")
    for name in ("max_source_length", "max_target_length"):
        if getattr(data, name) is None:
            continue
        if predicts_labels or data.loss_on == "all":
            reason = f"task {task}" if predicts_labels else "data.loss_on all"
            yield value_fault(("data", name), f"{reason} does not tell source and target apart; use data.max_length")


def _row_faults(data: DataConfig) -> Iterator[Fault]:
    if data.date is not None:
        try:
            datetime.date.fromisoformat(data.date)
        except ValueError:
            yield value_fault(("data", "date"), f"got '{data.date}', must be a date such as 2025-01-31")
    if data.on_bad_row == "error" and data.max_bad_rows != DataConfig.model_fields["max_bad_rows"].default:
        yield value_fault(("data", "max_bad_rows"), "no effect with data.on_bad_row error; set skip or remove this")
