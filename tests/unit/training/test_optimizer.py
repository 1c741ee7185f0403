"""The learning rate's table, the flat AdamW against torch's own on separate parameters, clipping, saved state."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup, get_wsd_schedule

from dist_qft.config.schema import TrainConfig
from dist_qft.errors import CorruptFileError, NumericError, SetupError, UserError
from dist_qft.training.norms import gradient_norm
from dist_qft.training.optimizer import (
    check_warmup,
    checkpoint_bytes,
    clip_gradient,
    learning_rate,
    make_optimizer,
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


def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


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


@pytest.mark.parametrize("make", [adamw, bitsandbytes_8bit])
@pytest.mark.parametrize("rank", [0, 1])
def test_moments_outside_the_device_of_the_values_are_sent_from_it(monkeypatch, make, rank):
    """Paged moments are CPU tensors beside values on a GPU, whose process group takes the GPU's tensors alone."""
    slices = Slices.divide([SIZE], world=2, rank=rank)
    values = nn.Parameter(torch.ones(slices.own[0][1] - slices.own[0][0]))
    optimizer, elsewhere = make(values), nn.Parameter(torch.empty_like(values, device="meta"))
    values.grad = torch.ones_like(values)
    optimizer.step()
    optimizer.state[elsewhere] = optimizer.state.pop(values)
    moved: list[torch.Tensor] = []
    monkeypatch.setattr("torch.distributed.gather", lambda sent, received, **_: moved.extend([sent, *(received or [])]))
    # What has arrived has no values here: only that it is put into CPU memory can be seen.
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other: self)
    state = OptimizerState(optimizer, [elsewhere], slices).gather()
    assert moved and {tensor.device.type for tensor in moved} == {"meta"}
    assert rank or {state[key].device.type for key in state} == {"cpu"}


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
