"""The learning rate's table, the flat AdamW against torch's own on separate parameters, clipping, saved state."""

import math
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import nn
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup, get_wsd_schedule

from dist_qft.config.schema import TrainConfig
from dist_qft.config.train_schema import LrGroup
from dist_qft.errors import CorruptFileError, NumericError, SetupError, UserError
from dist_qft.training.norms import gradient_norm
from dist_qft.training.optimizer import (
    Rates,
    check_warmup,
    checkpoint_bytes,
    clip_gradient,
    learning_rate,
    make_optimizer,
    require_lr_groups,
    scaled_ranges,
    step_with_ranges,
)
from dist_qft.training.optimizer_state import OptimizerState
from dist_qft.training.slices import Slices

SHAPES = [(3, 5), (7,), (2, 2, 2), (1,)]


@pytest.mark.parametrize(
    ("settings", "total", "expected"),
    [
        ({"lr_scheduler_type": "constant", "warmup_steps": 0}, 4, [1.0, 1.0, 1.0, 1.0]),
        ({"lr_scheduler_type": "constant", "warmup_steps": 3}, 5, [1 / 3, 2 / 3, 1.0, 1.0, 1.0]),
        ({"lr_scheduler_type": "linear", "warmup_steps": 0}, 4, [1.0, 0.75, 0.5, 0.25]),
        ({"lr_scheduler_type": "linear", "warmup_steps": 2}, 6, [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ({"lr_scheduler_type": "cosine", "warmup_steps": 0}, 4, [1.0, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]),
        ({"lr_scheduler_type": "cosine", "warmup_steps": 1}, 3, [1.0, 1.0, 0.5]),
        # A ratio is rounded up, and steps win over it.
        ({"lr_scheduler_type": "constant", "warmup_ratio": 0.3}, 5, [0.5, 1.0, 1.0, 1.0, 1.0]),
        ({"lr_scheduler_type": "constant", "warmup_ratio": 0.3, "warmup_steps": 1}, 2, [1.0, 1.0]),
        ({"lr_scheduler_type": "linear", "warmup_steps": 9}, 3, [1 / 9, 2 / 9, 3 / 9]),
        ({"lr_scheduler_type": "linear", "warmup_steps": 0, "min_lr_ratio": 0.5}, 4, [1.0, 0.875, 0.75, 0.625]),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2}, 3, [0.5, 1.0, 1.0]),
    ],
)
def test_learning_rate(settings, total, expected):
    config = TrainConfig(learning_rate=0.02, **settings)
    rates = [learning_rate(config, step, total) / 0.02 for step in range(total)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 7, 50])
def test_decay_never_rises_and_never_reaches_zero(kind, warmup):
    config = TrainConfig(lr_scheduler_type=kind, warmup_steps=warmup)
    rates = [learning_rate(config, step, 50) for step in range(warmup, 50)]
    assert rates == sorted(rates, reverse=True)
    assert all(rate > 0.0 for rate in rates)


@pytest.mark.parametrize("total", [1, 7, 40])
@pytest.mark.parametrize("lowest", [0.0, 0.1])
def test_schedules_are_those_of_transformers(total, lowest):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    decaying = math.ceil(0.3 * total)
    theirs = {
        "cosine": get_cosine_with_min_lr_schedule_with_warmup(optimizer, 0, total, min_lr_rate=lowest),
        "warmup_stable_decay": get_wsd_schedule(
            optimizer, 0, decaying, num_stable_steps=total - decaying, min_lr_ratio=lowest
        ),
    }
    for kind, schedule in theirs.items():
        config = TrainConfig(
            learning_rate=1.0, lr_scheduler_type=kind, warmup_steps=0, min_lr_ratio=lowest, decay_ratio=0.3
        )
        expected = [schedule.lr_lambdas[0](step) for step in range(total)]
        assert [learning_rate(config, step, total) for step in range(total)] == pytest.approx(expected), kind


def small_bitsandbytes(config: TrainConfig, values: nn.Parameter) -> torch.optim.Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit([values], lr=config.learning_rate)


def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


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


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_flat_fused_adamw_is_torchs_on_separate_parameters(weight_decay):
    config = TrainConfig(learning_rate=0.05, adam_beta1=0.8, adam_epsilon=1e-6, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    values = nn.Parameter(flat(parameters))
    ours = make_optimizer(config, [values])
    theirs = torch.optim.AdamW(
        parameters, lr=0.05, betas=(0.8, 0.999), eps=1e-6, weight_decay=weight_decay, fused=False, foreach=False
    )
    for _ in range(5):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        values.grad = flat([parameter.grad for parameter in parameters])
        ours.step()
        theirs.step()
    torch.testing.assert_close(values.detach(), flat(parameters), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-20, 0.01, 1.0, 1e3, 1e30])
@pytest.mark.parametrize("max_norm", [0.3, 2.0])
def test_clipping_is_torchs(scale, max_norm):
    """Also where the squares of finite gradients overflow float32: there torch's own norm is inf."""
    gradient = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * scale
    values = nn.Parameter(torch.zeros(1000))
    values.grad = gradient.clone()
    norm = gradient_norm(values.grad)
    clip_gradient([values], norm.item(), max_norm)
    reference = nn.Parameter(torch.zeros(1000, dtype=torch.float64))
    reference.grad = gradient.double()
    assert norm.item() == pytest.approx(nn.utils.clip_grad_norm_([reference], max_norm).item(), rel=1e-6)
    torch.testing.assert_close(values.grad.double(), reference.grad, rtol=1e-5, atol=0)


def test_no_clipping():
    values = nn.Parameter(torch.zeros(2))
    values.grad = torch.tensor([3.0, 4.0])
    clip_gradient([values], 5.0, None)
    assert values.grad.tolist() == [3.0, 4.0]


def test_paged_optimizers_need_cuda():
    with pytest.raises(SetupError) as raised:
        make_optimizer(TrainConfig(optim="paged_adamw_8bit"), [nn.Parameter(torch.zeros(3))])
    assert str(raised.value) == "train.optim: got paged_adamw_8bit, must be adamw on cpu"
    assert raised.value.exit_code == 3


# --- saved state -----------------------------------------------------------------------------------------------------

SIZE = 5000  # bitsandbytes keeps 32-bit state below 4096 values


def adamw(values: nn.Parameter) -> torch.optim.Optimizer:
    return make_optimizer(TrainConfig(learning_rate=0.01), [values])


def bitsandbytes_8bit(values: nn.Parameter) -> torch.optim.Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit([values], lr=0.01)


def state_of(optimizer: torch.optim.Optimizer, values: nn.Parameter) -> OptimizerState:
    return OptimizerState(optimizer, [values], Slices.whole([values.numel()]))


def steps(optimizer: torch.optim.Optimizer, values: nn.Parameter, first: int, last: int) -> None:
    for step in range(first, last):
        values.grad = torch.randn(SIZE, generator=torch.Generator().manual_seed(step))
        optimizer.step()


@pytest.mark.parametrize("make", [adamw, bitsandbytes_8bit])
def test_saved_state_continues_bit_for_bit(make):
    straight = nn.Parameter(torch.ones(SIZE))
    steps(make(straight), straight, 0, 6)

    first = nn.Parameter(torch.ones(SIZE))
    optimizer = make(first)
    steps(optimizer, first, 0, 3)
    saved = {key: tensor.clone() for key, tensor in state_of(optimizer, first).gather().items()}
    assert int(saved["step"]) == 3

    second = nn.Parameter(first.detach().clone())
    resumed = make(second)
    state_of(resumed, second).load(saved, "here")
    steps(resumed, second, 3, 6)
    assert torch.equal(straight, second)
    assert all(torch.equal(saved[key], value) for key, value in saved.items())


def refusal(kind: type[Exception], **tensors: Any) -> str:
    values = nn.Parameter(torch.ones(SIZE))
    state = {"step": torch.tensor(3.0), "exp_avg": torch.ones(SIZE), "exp_avg_sq": torch.ones(SIZE), **tensors}
    optimizer = adamw(values)
    with pytest.raises(kind) as raised:
        state_of(optimizer, values).load({k: v for k, v in state.items() if v is not None}, "optimizer.x")
    assert not optimizer.state
    return str(raised.value)


def test_state_that_does_not_fit():
    text = refusal(CorruptFileError, exp_avg_sq=torch.ones(SIZE - 1))
    assert text == "optimizer.x: exp_avg_sq has shape [4999], the trainables need [5000]"
    assert refusal(CorruptFileError, step=torch.ones(1)) == "optimizer.x: step has shape [1], the trainables need []"
    text = refusal(UserError, exp_avg_sq=None, state1=torch.ones(SIZE))
    assert text == (
        "optimizer.x: saved with another train.optim: its state has exp_avg, state1, step, "
        "AdamW needs exp_avg, exp_avg_sq, step"
    )


@pytest.mark.parametrize(
    ("key", "tensor", "fault"),
    [
        ("exp_avg", torch.ones(SIZE, dtype=torch.int32), "got torch.int32, must be torch.float32"),
        ("exp_avg", torch.ones(SIZE, dtype=torch.float64), "got torch.float64, must be torch.float32"),
        ("exp_avg_sq", torch.full((SIZE,), math.inf), "holds values that are not finite"),
        ("step", torch.tensor(math.nan), "holds values that are not finite"),
    ],
)
def test_state_that_no_run_can_have_saved(key, tensor, fault):
    assert refusal(CorruptFileError, **{key: tensor}) == f"optimizer.x: {key}: {fault}"


def test_moments_that_have_overflowed_are_not_saved():
    """The square of a gradient of 1e22, without clipping, is infinite: from then on nothing would be learned."""
    values = nn.Parameter(torch.zeros(4))
    optimizer = adamw(values)
    values.grad = torch.tensor([1.0, 1e22, 0.0, 0.0])
    optimizer.step()
    assert torch.isfinite(values).all()
    with pytest.raises(NumericError, match=r"^step 7: the optimizer's exp_avg_sq is not finite") as raised:
        state_of(optimizer, values).require_finite(step=7)
    assert raised.value.exit_code == 6 and raised.value.everywhere


@pytest.mark.parametrize("kind", ["adamw", "paged_adamw_32bit", "paged_adamw_8bit"])
def test_bytes_of_a_checkpoint(kind):
    """Against the tensors that an optimizer of that kind really has."""
    values = nn.Parameter(torch.ones(SIZE))
    optimizer = bitsandbytes_8bit(values) if kind == "paged_adamw_8bit" else adamw(values)
    steps(optimizer, values, 0, 1)
    tensors = state_of(optimizer, values).gather()
    small = sum(tensor.nbytes for key, tensor in tensors.items() if key == "step" or key.startswith("qmap"))
    counted = sum(tensor.nbytes for tensor in tensors.values()) - small + values.nbytes
    assert checkpoint_bytes(TrainConfig(optim=kind), SIZE) == counted


def test_cosine_ends_near_zero():
    config = TrainConfig(learning_rate=1.0, lr_scheduler_type="cosine", warmup_steps=0)
    assert learning_rate(config, 99, 100) == pytest.approx((1 + math.cos(0.99 * math.pi)) / 2)


def test_a_warm_up_that_outlasts_a_run_in_epochs_is_refused():
    config = TrainConfig(num_train_epochs=0.2, warmup_steps=500)
    with pytest.raises(UserError, match=r"^train\.warmup_steps: got 500, must be less than the run's 3 steps"):
        check_warmup(config, 3)
    for steps in (3, 500):
        with pytest.raises(UserError):
            check_warmup(config, steps)
    check_warmup(config, 501)


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
