"""The optimizer over the flat trainables, its learning rate as a pure function of the step, and its state."""

import math
from collections.abc import Mapping
from typing import TypedDict

import torch
from torch import Tensor, nn

from dist_qft.config.schema import TrainConfig
from dist_qft.errors import CorruptFileError, NumericError, SetupError, UserError

_NORM_CHUNK = 1 << 22  # values per piece of the norm: bounds the float64 copy to 32 MiB


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (0-based): linear warm-up, then the schedule's share of the peak.

    `min_lr_ratio` is the share that decaying schedules end at. `warmup_stable_decay` stays at the peak until the last
    `decay_ratio` of all steps and then falls along a cosine, as transformers' schedule of that name.
    """
    warmup = config.warmup_steps
    if warmup is None:
        warmup = math.ceil(config.warmup_ratio * total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    kind, lowest = config.lr_scheduler_type, config.min_lr_ratio
    if kind in ("constant", "constant_with_warmup"):
        return config.learning_rate
    start = warmup
    if kind == "warmup_stable_decay":
        start = max(warmup, total_steps - math.ceil(config.decay_ratio * total_steps))
    done = max(0, step - start) / max(1, total_steps - start)
    share = 1.0 - done if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return config.learning_rate * (lowest + (1.0 - lowest) * share if lowest else share)


def check_warmup(config: TrainConfig, total_steps: int) -> None:
    """Refuse a warm-up as long as the run, whose length in epochs is known only with its data. UserError."""
    if config.max_steps is None and config.warmup_steps is not None and 0 < total_steps <= config.warmup_steps:
        raise UserError(
            f"train.warmup_steps: got {config.warmup_steps}, must be less than the run's {total_steps} steps "
            f"(train.num_train_epochs {config.num_train_epochs:g}), or no step has the full learning rate"
        )


class _AdamW(TypedDict):
    """The settings that torch's AdamW and those of bitsandbytes have in common."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


def make_optimizer(config: TrainConfig, values: nn.Parameter) -> torch.optim.Optimizer:
    """One fused AdamW over the flat buffer; bitsandbytes' paged AdamW (as in the papers) on CUDA only."""
    settings = _AdamW(
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )
    if config.optim == "adamw":
        return torch.optim.AdamW([values], fused=True, **settings)
    if values.device.type != "cuda":
        raise SetupError(f"train.optim: got {config.optim}, must be adamw on {values.device.type}")
    import bitsandbytes

    kind = {"paged_adamw_32bit": "PagedAdamW32bit", "paged_adamw_8bit": "PagedAdamW8bit"}[config.optim]
    return getattr(bitsandbytes.optim, kind)([values], **settings)


def faster_ranges(config: TrainConfig, spans: Mapping[str, tuple[int, int]]) -> list[tuple[int, int]]:
    """The ranges of the flat buffer that `loraplus_lr_ratio` speeds up: every adapter's B (LoRA+, arXiv 2402.12354)."""
    if config.loraplus_lr_ratio is None:
        return []
    return [span for name, span in spans.items() if name.endswith(".B")]


@torch.no_grad()
def step_with_ranges(
    optimizer: torch.optim.Optimizer, values: nn.Parameter, ranges: list[tuple[int, int]], ratio: float
) -> None:
    """One optimizer step, with `ratio` times the learning rate in some ranges of the flat buffer.

    AdamW's step is linear in the learning rate, weight decay included, so the step of a range is scaled afterwards. The
    optimizer's state is that of a step without ranges.
    """
    before = [values[start:stop].clone() for start, stop in ranges]
    optimizer.step()
    for (start, stop), old in zip(ranges, before, strict=True):
        values[start:stop].sub_(old).mul_(ratio).add_(old)


def gradient_norm(gradient: Tensor) -> Tensor:
    """L2 norm of a flat gradient, a float64 scalar on its device."""
    # In float64, because squares of finite float32 values overflow float32: clipping by inf would zero the step.
    parts = gradient.split(_NORM_CHUNK)
    return torch.stack([torch.linalg.vector_norm(part, dtype=torch.float64) for part in parts]).norm()


def clip_gradient(values: nn.Parameter, norm: float, max_norm: float | None) -> None:
    """Scale the flat gradient, whose L2 norm is known, to at most `max_norm`."""
    gradient = values.grad
    assert gradient is not None, "the flat buffer has its gradients from the start"
    if max_norm is not None and (share := max_norm / (norm + 1e-6)) < 1.0:
        gradient.mul_(share)


def optimizer_tensors(optimizer: torch.optim.Optimizer, values: nn.Parameter) -> dict[str, Tensor]:
    """The optimizer's state as named tensors (moments, step count), ready for safetensors."""
    state = optimizer.state[values]
    return {key: value if isinstance(value, Tensor) else torch.tensor(value) for key, value in state.items()}


def require_finite_state(tensors: Mapping[str, Tensor], step: int) -> None:
    """Refuse to save a state that would spoil every later step. `step` is for the message.

    Raises:
        NumericError: a moment is not finite, such as the square of a very large gradient.
    """
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not math.isfinite(
            float(torch.linalg.vector_norm(tensor.float(), ord=math.inf))
        ):
            raise NumericError(f"step {step}: the optimizer's {key} is not finite; the step is not saved")


def optimizer_bytes(config: TrainConfig, trainables: int) -> int:
    """Bytes of the two moments: fp32, or 8 bits with an fp32 constant for every 256 (bitsandbytes)."""
    if config.optim == "paged_adamw_8bit":
        return 2 * (trainables + 4 * math.ceil(trainables / 256))
    return 2 * 4 * trainables


def checkpoint_bytes(config: TrainConfig, trainables: int) -> int:
    """Bytes of a checkpoint of so many trainables, without its small JSON files: values in fp32, and the moments."""
    return 4 * trainables + optimizer_bytes(config, trainables)


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, values: nn.Parameter, tensors: dict[str, Tensor], where: str
) -> None:
    """Put saved state back into an optimizer that has not stepped yet.

    Raises:
        UserError: the state is another optimizer's.
        CorruptFileError: a tensor's shape is not the one this optimizer needs.
    """
    fresh = _fresh_state(optimizer, values)
    if set(fresh) != set(tensors):
        raise UserError(
            f"{where}: saved with another train.optim: its state has {', '.join(sorted(tensors))}, "
            f"{type(optimizer).__name__} needs {', '.join(sorted(fresh))}"
        )
    for key, blank in fresh.items():
        needed = list(blank.shape) if isinstance(blank, Tensor) else []
        if list(tensors[key].shape) != needed:
            raise CorruptFileError(f"{where}: {key} has shape {list(tensors[key].shape)}, the trainables need {needed}")
        _require_sound(tensors[key], blank, f"{where}: {key}")
    optimizer.state[values] = {
        # Into the buffers that are there: bitsandbytes' live in paged memory.
        key: blank.copy_(tensors[key]) if isinstance(blank, Tensor) else tensors[key].item()
        for key, blank in fresh.items()
    }


def _require_sound(saved: Tensor, blank: Tensor | int, where: str) -> None:
    """CorruptFileError unless a saved tensor has the dtype that the optimizer needs and finite values."""
    if isinstance(blank, Tensor) and saved.dtype != blank.dtype:
        raise CorruptFileError(f"{where}: got {saved.dtype}, must be {blank.dtype}")
    if saved.is_floating_point() and not torch.isfinite(saved).all():
        raise CorruptFileError(f"{where}: holds values that are not finite")


def _fresh_state(optimizer: torch.optim.Optimizer, values: nn.Parameter) -> dict[str, Tensor | int]:
    if isinstance(optimizer, torch.optim.AdamW):
        # As the fused kernel wants it: the step count is a float32 scalar on the parameter's device.
        step = torch.zeros((), device=values.device)
        return {"step": step, "exp_avg": torch.zeros_like(values), "exp_avg_sq": torch.zeros_like(values)}
    from bitsandbytes.optim.optimizer import Optimizer2State

    assert isinstance(optimizer, Optimizer2State), "make_optimizer makes no others"
    optimizer.init_state(optimizer.param_groups[0], values, 0, 0)
    return dict(optimizer.state[values])
