"""The optimizer over the flat trainables, its learning rate as a pure function of the step, and its state."""

import math

import torch
from torch import Tensor, nn

from dist_qft.config.schema import TrainConfig
from dist_qft.errors import CorruptFileError, SetupError


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (0-based): linear warmup, then constant, linear or cosine to 0."""
    warmup = config.warmup_steps
    if warmup is None:
        warmup = math.ceil(config.warmup_ratio * total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.lr_scheduler_type == "constant":
        return config.learning_rate
    done = (step - warmup) / max(1, total_steps - warmup)
    if config.lr_scheduler_type == "linear":
        return config.learning_rate * (1.0 - done)
    return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))


def make_optimizer(config: TrainConfig, values: nn.Parameter) -> torch.optim.Optimizer:
    """One fused AdamW over the flat buffer; bitsandbytes' paged AdamW (as in the papers) on CUDA only."""
    settings = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }
    if config.optim == "adamw":
        return torch.optim.AdamW([values], fused=True, **settings)
    if values.device.type != "cuda":
        raise SetupError(f"train.optim: '{config.optim}' needs CUDA; on {values.device.type} use 'adamw'")
    import bitsandbytes

    kind = {"paged_adamw_32bit": "PagedAdamW32bit", "paged_adamw_8bit": "PagedAdamW8bit"}[config.optim]
    return getattr(bitsandbytes.optim, kind)([values], **settings)


def clip_gradient(values: nn.Parameter, max_norm: float | None) -> Tensor:
    """Scale the flat gradient to at most `max_norm` (L2); returns the norm before, as a tensor."""
    norm = values.grad.norm()
    if max_norm is not None:
        values.grad.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def optimizer_tensors(optimizer: torch.optim.Optimizer, values: nn.Parameter) -> dict[str, Tensor]:
    """The optimizer's state as named tensors (moments, step count), ready for safetensors."""
    state = optimizer.state[values]
    return {key: value if isinstance(value, Tensor) else torch.tensor(value) for key, value in state.items()}


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, values: nn.Parameter, tensors: dict[str, Tensor], where: str
) -> None:
    """Put saved state back. Raises CorruptFileError if a moment's size is not that of the trainables."""
    for key, tensor in tensors.items():
        if key in ("exp_avg", "exp_avg_sq") and tensor.numel() != values.numel():
            raise CorruptFileError(f"{where}: {key} has {tensor.numel()} values, the trainables {values.numel()}")
    optimizer.state[values] = {
        key: tensor if key == "step" else tensor.to(values.device) for key, tensor in tensors.items()
    }
