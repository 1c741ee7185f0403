"""Refuse packing for decoders that let a packed sample change the next one."""

from typing import TYPE_CHECKING

import torch

from dist_qft.base_model import segment_attention
from dist_qft.errors import UserError
from dist_qft.ranks.collectives import everywhere

if TYPE_CHECKING:
    from dist_qft.base_model.skeleton import BaseModel


@torch.no_grad()
def require(base: "BaseModel", device: torch.device, rows_at_once: int) -> None:
    """Refuse packing for a family that lets a packed sample change the next one. Collective; needs weights.

    Args:
        rows_at_once: of a micro-batch. Flash attention of transformers keeps samples apart in a lone row only.

    Raises:
        UserError: as layers that carry a state along the row (convolutions, state spaces) do.
    """
    token = torch.arange(4, device=device) % base.vocab_size
    rows = torch.stack([token, token.roll(1)])
    rows[:, 2:] = token[:2]
    positions = torch.tensor([[0, 1, 0, 1]], device=device)
    parts = rows.split(min(rows_at_once, 2))
    states = torch.cat([base.hidden_states(part, positions.expand(len(part), -1)) for part in parts])
    tolerance = 1e-4 if base.dtype == torch.float32 else 1e-2
    if (states[0, 2:] - states[1, 2:]).abs().max() > tolerance * states.abs().max():
        name, attention = base.config.model_type, segment_attention.library_name(base.config)
        remedy = "set it to false"
        if attention.startswith("flash"):
            remedy += f", or train.per_device_train_batch_size to 1 for model.attention: {attention}"
        raise everywhere(UserError(f"data.packing: model type '{name}' cannot keep packed samples apart; {remedy}"))
