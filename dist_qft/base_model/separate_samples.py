"""Refuse packing for decoders that let a packed sample change the next one.

Two packed rows differ in their first sample alone; the states of the second must not. How much of a difference is noise
is measured, since it depends on the dtype and on the family: the same tokens, in the same order, are computed as rows
of their own. A mixture's experts round a token in another way if other tokens come with it; dense layers do not, and
then a single other bit shows a leak.
"""

import math
import re
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from dist_qft.base_model import segment_attention
from dist_qft.errors import UserError
from dist_qft.ranks.collectives import everywhere, maximum

if TYPE_CHECKING:
    from dist_qft.base_model.skeleton import BaseModel

_LENGTH = 21  # of each sample: odd, and two are longer than any kernel of a convolution
_TIMES_THE_NOISE = 4.0
_TRIES = 3
_NOTHING = 1e-3  # of the dtype's resolution
# Attention to blocks of the row, which samples share, shows only in rows of many of them: hundreds of tokens.
_BLOCKWISE = re.compile("compress|sparse")


@torch.no_grad()
def require(base: "BaseModel", device: torch.device, rows_at_once: int) -> None:
    """Refuse packing for a family that lets a packed sample change the next one. Collective; needs weights.

    Args:
        rows_at_once: of a micro-batch. Flash attention of transformers keeps samples apart in a lone row only.

    Raises:
        UserError: as layers that carry a state along the row (convolutions, state spaces) do, and layers that attend to
            blocks of the row.
    """
    kinds = getattr(base.config.get_text_config(), "layer_types", None) or ()
    if any(_BLOCKWISE.search(kind) for kind in kinds) or _leaks(base, device, min(rows_at_once, 2)):
        name, attention = base.config.model_type, segment_attention.library_name(base.config)
        remedy = "set it to false"
        if attention.startswith("flash"):
            remedy += f", or train.per_device_train_batch_size to 1 for model.attention: {attention}"
        raise everywhere(UserError(f"data.packing: model type '{name}' cannot keep packed samples apart; {remedy}"))


def _leaks(base: "BaseModel", device: torch.device, rows_at_once: int) -> bool:
    """True on all ranks if samples always change the next one by more than rows of their own ever change each other.

    More than once only where they seem to: noise may choose another expert for a token, on either side.
    """
    found, noise = math.inf, 0.0
    for seed in range(_TRIES):
        changed, by_noise, size = _changes(base, device, rows_at_once, seed)
        found, noise = min(found, changed), max(noise, by_noise)
        excess = found - _TIMES_THE_NOISE * noise - _NOTHING * torch.finfo(base.dtype).eps * size
        if not math.isfinite(excess):  # states that overflow tell nothing; training says so
            excess = 0.0
        if (maximum(excess, device) if dist.is_initialized() else excess) <= 0:
            return False
    return True


def _changes(base: "BaseModel", device: torch.device, rows_at_once: int, seed: int) -> tuple[float, float, float]:
    """Change the first sample and measure the changes of the second's states: packed, and in rows of their own.

    Returns the root mean squares of both changes and of the states.
    """
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randint(base.vocab_size, (3, _LENGTH), generator=generator).to(device)
    rows = torch.cat([samples[:2], samples[2:].expand(2, -1)], dim=1)
    own = torch.arange(_LENGTH, device=device)
    packed, apart = [], []
    for part in rows.split(rows_at_once):
        positions = own.repeat(2).expand(len(part), -1)
        packed.append(base.hidden_states(part, positions))
        alone = base.hidden_states(part.view(-1, _LENGTH), own.expand(2 * len(part), -1))
        apart.append(alone.reshape(len(part), 2 * _LENGTH, -1))
    both, single = torch.cat(packed)[:, _LENGTH:], torch.cat(apart)[:, _LENGTH:]
    return _size(both[0].double() - both[1]), _size(single[0].double() - single[1]), _size(both[0].double())


def _size(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
