"""The optimizer over the flat trainables, its learning rate as a pure function of the step, and its state."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from dist_qft.config.schema import TrainConfig
from dist_qft.errors import SetupError, UserError
from dist_qft.training.exact_share import ceil_product
from dist_qft.training.slices import BLOCK, padded_slice

_SHARDED_FROM = 64_000_000  # trainables whose optimizer is spread over the ranks by default: moments of 0.5 GB
_SMALL = 4096  # values for which bitsandbytes' 8-bit AdamW keeps 32-bit moments


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (0-based): linear warm-up, then the schedule's share of the peak.

    `min_lr_ratio` is the share that decaying schedules end at. `warmup_stable_decay` stays at the peak until the last
    `decay_ratio` of all steps and then falls along a cosine, as transformers' schedule of that name.
    """
    warmup = warmup_steps(config, total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    kind, lowest = config.lr_scheduler_type, config.min_lr_ratio
    if kind in ("constant", "constant_with_warmup"):
        return config.learning_rate
    start = warmup
    if kind == "warmup_stable_decay":
        start = max(warmup, total_steps - ceil_product(config.decay_ratio, total_steps))
    done = max(0, step - start) / max(1, total_steps - start)
    share = 1.0 - done if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return config.learning_rate * (lowest + (1.0 - lowest) * share if lowest else share)


def warmup_steps(config: TrainConfig, total_steps: int) -> int:
    """Steps of the warm-up in a run of so many."""
    if config.warmup_steps is not None:
        return config.warmup_steps
    return ceil_product(config.warmup_ratio, total_steps)


def check_warmup(config: TrainConfig, total_steps: int) -> None:
    """Refuse a warm-up as long as the run, whose length in epochs is known only with its data. UserError."""
    if config.max_steps is None and config.warmup_steps is not None and 0 < total_steps <= config.warmup_steps:
        raise UserError(
            f"train.warmup_steps: got {config.warmup_steps}, must be less than the run's {total_steps} steps "
            f"(train.num_train_epochs {config.num_train_epochs:g}), or the whole run is a warm-up"
        )


class _AdamW(TypedDict):
    """The settings that torch's AdamW and those of bitsandbytes have in common."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


def shards_optimizer(config: TrainConfig, trainables: int, world_size: int) -> bool:
    """True if each rank keeps only its part of the optimizer's state (`train.shard_optimizer`)."""
    asked = config.shard_optimizer
    return world_size > 1 and (trainables >= _SHARDED_FROM if asked is None else asked)


def make_optimizer(
    config: TrainConfig, parts: Sequence[nn.Parameter], total: int | None = None
) -> torch.optim.Optimizer:
    """One fused AdamW over the flat buffer; bitsandbytes' paged AdamW (as in the papers) on CUDA only.

    Args:
        parts: the flat buffer, or this rank's slices of it.
        total: values in the whole buffer; by default those of `parts`.
    """
    settings = _AdamW(
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )
    if config.optim == "adamw":
        return torch.optim.AdamW(parts, fused=True, **settings)
    device = parts[0].device.type
    if device != "cuda":
        raise SetupError(f"train.optim: got {config.optim}, must be adamw on {device}")
    import bitsandbytes

    kind = {"paged_adamw_32bit": "PagedAdamW32bit", "paged_adamw_8bit": "PagedAdamW8bit"}[config.optim]
    total = total or sum(part.numel() for part in parts)
    return getattr(bitsandbytes.optim, kind)(parts, min_8bit_size=smallest_in_8_bits(total), **settings)


def smallest_in_8_bits(total: int) -> int:
    """The size from which bitsandbytes keeps a tensor's moments in 8 bits: all slices are kept as the whole is."""
    return 0 if total >= _SMALL else _SMALL


def lr_ratio(config: TrainConfig, name: str) -> float:
    """A trainable's learning rate over that of the run: that of its group, and of an adapter's B that of LoRA+.

    LoRA+: arXiv 2402.12354.
    """
    group = _group_of(config, name)
    ratio = 1.0 if group is None else config.lr_groups[group].lr / config.learning_rate
    return ratio * (config.loraplus_lr_ratio or 1.0) if name.endswith(".B") else ratio


def _group_of(config: TrainConfig, name: str) -> int | None:
    found = (i for i, group in enumerate(config.lr_groups) if any(part in name for part in group.modules))
    return next(found, None)


class Rates(NamedTuple):
    """The learning rate and the weight decay of some trainables, over those of the run."""

    learning: float = 1.0
    decay: float = 1.0


def scaled_ranges(
    config: TrainConfig, spans: Mapping[str, tuple[int, int]], vectors: Collection[str] = ()
) -> dict[Rates, list[tuple[int, int]]]:
    """The ranges of the flat buffer with other rates than the run's, by these.

    Weight decay is for matrices, as in transformers. Of `vectors`, which have fewer than two dimensions (norms, biases,
    the side network's gates and share), zero is not where they begin, nor where the model is the base.
    """
    found: dict[Rates, list[tuple[int, int]]] = {}
    for name, span in spans.items():
        keeps = config.weight_decay > 0 and name in vectors
        if (rates := Rates(lr_ratio(config, name), 0.0 if keeps else 1.0)) != Rates():
            found.setdefault(rates, []).append(span)
    return found


def require_lr_groups(config: TrainConfig, names: Callable[[], Iterable[str]]) -> None:
    """Refuse a group that no trainable is in; `names` are those of all trainables. UserError."""
    if not config.lr_groups:
        return
    every = list(names())
    used = {_group_of(config, name) for name in every}
    for index, group in enumerate(config.lr_groups):
        if index not in used:
            earlier = any(part in name for part in group.modules for name in every)
            reason = "earlier groups have all of them" if earlier else f"no trainable is called so; one is {every[0]}"
            raise UserError(f"train.lr_groups.{index}.modules: got {', '.join(group.modules)}, but {reason}; remove it")


@torch.no_grad()
def step_with_ranges(optimizer: torch.optim.Optimizer, scaled: Sequence[tuple[Tensor, Rates]]) -> None:
    """One optimizer step, with rates of their own for `scaled`, views of the values that it updates.

    AdamW's step does not depend on the values, but for weight decay, and is linear in the learning rate. So those of
    `scaled` are zero while the optimizer steps: what it leaves there is the step itself, which no value has rounded,
    however small the run's rate is. The optimizer's state is that of a step without ranges.
    """
    if not scaled:
        optimizer.step()
        return
    settings = optimizer.param_groups[0]
    decay = settings["lr"] * settings["weight_decay"]
    values = [each for each, _ in scaled]
    # One kernel for all ranges, and products and sums apart: on every slice of the values with the same bits.
    kept = torch._foreach_mul(values, [1.0 - decay * rates.learning * rates.decay for _, rates in scaled])
    torch._foreach_zero_(values)
    optimizer.step()
    torch._foreach_mul_(values, [rates.learning for _, rates in scaled])
    torch._foreach_add_(values, kept)


def clip_gradient(parts: Sequence[nn.Parameter], norm: float, max_norm: float | None) -> None:
    """Scale the flat gradient, whose L2 norm is known, to at most `max_norm`; `parts` are this rank's of it."""
    if max_norm is None or (share := max_norm / (norm + 1e-6)) >= 1.0:
        return
    for part in parts:
        assert part.grad is not None, "the flat buffer has its gradients from the start"
        part.grad.mul_(share)


def optimizer_bytes(config: TrainConfig, trainables: int) -> int:
    """Bytes of the two moments: fp32, or 8 bits with an fp32 constant for every 256 (bitsandbytes)."""
    if config.optim == "paged_adamw_8bit":
        return 2 * (trainables + 4 * math.ceil(trainables / 256))
    return 2 * 4 * trainables


def optimizer_bytes_per_rank(config: TrainConfig, trainables: int, world_size: int, block: int = BLOCK) -> int:
    """Bytes of the two moments that each rank keeps; slices are multiples of so many values."""
    if shards_optimizer(config, trainables, world_size):
        trainables = padded_slice(trainables, world_size, block)
    return optimizer_bytes(config, trainables)


def checkpoint_bytes(config: TrainConfig, trainables: int) -> int:
    """Bytes of a checkpoint of so many trainables, without its small JSON files: values in fp32, and the moments."""
    return 4 * trainables + optimizer_bytes(config, trainables)
