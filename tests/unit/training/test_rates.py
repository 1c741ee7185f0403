"""Ranges of the flat buffer with rates of their own: groups, LoRA+, and vectors without weight decay."""

import math
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dist_qft.config.data_schema import TaskConfig
from dist_qft.config.schema import TrainConfig
from dist_qft.config.train_schema import LrGroup
from dist_qft.errors import UserError
from dist_qft.training.optimizer import Rates, make_optimizer, require_lr_groups, scaled_ranges, step_with_ranges
from dist_qft.tuned_model.task import trainable_names


def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def small_bitsandbytes(config: TrainConfig, values: nn.Parameter) -> torch.optim.Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit([values], lr=config.learning_rate)


def test_loraplus_is_torchs_parameter_groups():
    generator = torch.Generator().manual_seed(3)
    start = [torch.randn(6, generator=generator) for _ in range(4)]
    names = ["q.B", "q.A", "up.B", "up.A"]
    spans = {name: (6 * index, 6 * index + 6) for index, name in enumerate(names)}
    config = TrainConfig(learning_rate=0.01, weight_decay=0.1, loraplus_lr_ratio=16.0)
    values = nn.Parameter(torch.cat(start))
    optimizer = make_optimizer(config, [values])
    theirs = [nn.Parameter(tensor.clone()) for tensor in start]
    groups = [{"params": theirs[first::2], "lr": rate} for first, rate in ((0, 0.16), (1, 0.01))]
    reference = torch.optim.AdamW(groups, weight_decay=0.1)
    ((_, ranges),) = scaled_ranges(config, spans).items()
    assert ranges == [(0, 6), (12, 18)] and scaled_ranges(TrainConfig(), spans) == {}
    for _ in range(5):
        values.grad = torch.randn(24, generator=generator)
        for parameter, (first, last) in zip(theirs, spans.values(), strict=True):
            parameter.grad = values.grad[first:last].clone()
        step_with_ranges(optimizer, [(values.data[start:stop], Rates(16.0)) for start, stop in ranges])
        reference.step()
    torch.testing.assert_close(values.detach(), flat(theirs), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("make", "tolerance"),
    [(lambda config, values: make_optimizer(config, [values]), 1e-7), (small_bitsandbytes, 2e-5)],
    ids=["torch", "bitsandbytes"],
)
def test_a_group_keeps_its_rate_where_that_of_the_run_is_lost_in_float32(make, tolerance):
    values = nn.Parameter(torch.ones(3))
    values.grad = torch.ones(3)
    step_with_ranges(make(TrainConfig(learning_rate=1e-9), values), [(values.data[1:2], Rates(1e6))])
    torch.testing.assert_close(values.detach(), torch.tensor([1.0, 0.999, 1.0]), rtol=0, atol=tolerance)


def test_vectors_have_no_weight_decay():
    """As torch has it of two groups, one of them with another learning rate as well."""
    config = TrainConfig(learning_rate=0.01, weight_decay=0.5, lr_groups=[{"modules": ["layers.1."], "lr": 0.05}])
    shapes = {"layers.0.w": (2, 3), "layers.0.norm": (3,), "layers.1.w": (3, 2), "layers.1.bias": (2,), "alpha": ()}
    ends = list(accumulate(math.prod(shape) for shape in shapes.values()))
    spans = dict(zip(shapes, pairwise([0, *ends]), strict=True))
    vectors = [name for name, shape in shapes.items() if len(shape) < 2]
    found = scaled_ranges(config, spans, vectors)
    assert {(round(rates.learning, 6), rates.decay): ranges for rates, ranges in found.items()} == {
        (1.0, 0.0): [spans["layers.0.norm"], spans["alpha"]],
        (5.0, 1.0): [spans["layers.1.w"]],
        (5.0, 0.0): [spans["layers.1.bias"]],
    }
    assert scaled_ranges(TrainConfig(), spans, vectors) == {}
    generator = torch.Generator().manual_seed(0)
    values = nn.Parameter(torch.randn(ends[-1], generator=generator))
    theirs = {name: nn.Parameter(values.detach()[slice(*span)].clone()) for name, span in spans.items()}
    groups = [
        {"params": [p], "lr": 0.05 if "layers.1." in name else 0.01, "weight_decay": 0.0 if name in vectors else 0.5}
        for name, p in theirs.items()
    ]
    ours, reference = make_optimizer(config, [values]), torch.optim.AdamW(groups)
    scaled = [(values.data[slice(*span)], rates) for rates, ranges in found.items() for span in ranges]
    for _ in range(3):
        values.grad = torch.randn(ends[-1], generator=generator)
        for name, parameter in theirs.items():
            parameter.grad = values.grad[slice(*spans[name])].clone()
        step_with_ranges(ours, scaled)
        reference.step()
    torch.testing.assert_close(values.detach(), flat(list(theirs.values())), rtol=1e-5, atol=1e-7)


def test_learning_rates_by_group_are_ranges_and_the_first_group_counts():
    groups = [{"modules": ["layers.0."], "lr": 0.1}, {"modules": ["q_proj", "o_proj"], "lr": 0.02, "name": "attention"}]
    config = TrainConfig(learning_rate=0.01, loraplus_lr_ratio=4.0, lr_groups=groups)
    names = ["layers.0.q_proj.A", "layers.0.q_proj.B", "layers.1.q_proj.A", "layers.1.up_proj.A", "layers.1.up_proj.B"]
    spans = {name: (10 * i, 10 * i + 10) for i, name in enumerate(names)}
    found = scaled_ranges(config, spans)
    assert {round(rates.learning, 6): ranges for rates, ranges in found.items()} == {
        10.0: [(0, 10)],
        40.0: [(10, 20)],
        2.0: [(20, 30)],
        4.0: [(40, 50)],
    }
    require_lr_groups(config, lambda: names)
    for modules in (["k_proj"], ["layers.0.q_proj"]):
        wrong = config.model_copy(update={"lr_groups": [*config.lr_groups, LrGroup(modules=modules, lr=1.0)]})
        with pytest.raises(UserError, match=r"^train.lr_groups.2.modules: got "):
            require_lr_groups(wrong, lambda: names)


@pytest.mark.parametrize("task", [{"name": "classification", "labels": ["no", "yes"]}, {"name": "regression"}, {}])
def test_the_head_of_a_task_is_a_group(task):
    config = TrainConfig(lr_groups=[{"modules": ["score"], "lr": 0.01}])
    spec: Any = SimpleNamespace(names=lambda: ["q.B", "q.A"])
    names = trainable_names(TaskConfig(**task), spec)
    assert names == ["q.B", "q.A", *(["score"] if task else [])]
    if task:
        require_lr_groups(config, lambda: names)
    else:
        with pytest.raises(UserError, match=r"^train.lr_groups.0.modules: got score, but no trainable is called so"):
            require_lr_groups(config, lambda: names)
