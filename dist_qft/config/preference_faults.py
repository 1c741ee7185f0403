"""Rules for the tasks that prefer answers to others: dpo, orpo and kto."""

from collections.abc import Iterator
from typing import get_args

from dist_qft.config.data_schema import DPOLoss, KTOLoss
from dist_qft.config.fault import Fault, value_fault
from dist_qft.config.schema import RunConfig
from dist_qft.config.section import changed
from dist_qft.divisors import either

_LOSSES = {"dpo": get_args(DPOLoss), "kto": get_args(KTOLoss)}
_USED_BY = {
    "beta": ("dpo", "orpo", "kto"),
    "loss_type": ("dpo", "kto"),
    "label_smoothing": ("dpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}
_SMOOTHED = ("robust", "exo_pair")


def preference_faults(config: RunConfig) -> Iterator[Fault]:
    """Every broken rule; for other tasks, the settings of `task` that they do not use."""
    task = config.task
    for key, users in _USED_BY.items():
        if changed(task, key) and task.name not in users:
            yield value_fault(("task", key), f"no effect with task {task.name}; remove it")
    if not task.prefers:
        return
    yield from _loss_faults(config)
    yield from _data_faults(config)


def _loss_faults(config: RunConfig) -> Iterator[Fault]:
    task = config.task
    allowed = _LOSSES.get(task.name, ())
    if task.loss_type is not None and allowed and task.loss_type not in allowed:
        must_be = f"must be {either(list(allowed))} with task {task.name}"
        yield value_fault(("task", "loss_type"), f"got {task.loss_type}, {must_be}")
    if task.name == "dpo" and task.label_smoothing and task.loss not in _SMOOTHED:
        yield value_fault(("task", "label_smoothing"), f"no effect with loss_type {task.loss}; remove it")
    if task.loss == "exo_pair" and not task.label_smoothing:
        yield value_fault(("task", "label_smoothing"), "got 0, must be above 0 with loss_type exo_pair, such as 0.001")
    if task.rows == "rated-with-kl" and config.train.per_device_train_batch_size < 2:
        yield value_fault(
            ("train", "per_device_train_batch_size"),
            "got 1, must be at least 2 with task kto, whose KL is measured on the answers to a micro-batch's other "
            "prompts; or set task.loss_type apo_zero_unpaired",
        )
    if config.method.name == "qst" and config.method.cache != "none":
        yield value_fault(("method", "cache"), f"task {task.name} has several rows to a sample; remove it")


def _data_faults(config: RunConfig) -> Iterator[Fault]:
    data, task = config.data, config.task.name
    if data is None:
        return
    if data.packing:
        yield value_fault(("data", "packing"), f"task {task} compares whole rows; remove it")
    if data.loss_on == "all":
        yield value_fault(("data", "loss_on"), f"task {task} compares answers, not prompts; remove it")
