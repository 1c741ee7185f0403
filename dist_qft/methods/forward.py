"""The source of a micro-batch's last hidden states, normally a forward pass of the base."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dist_qft.base_model.skeleton import BaseModel
from dist_qft.data.batches import MicroBatch


class Forward(Protocol):
    """The tuned model up to its last hidden states."""

    def begin_step(self, batches: list[MicroBatch]) -> None:
        """Announce this rank's micro-batches of a training step. Collective."""

    def __call__(self, batch: MicroBatch) -> Tensor:
        """(b, L, D) in the compute dtype. Collective on a sharded base."""


@dataclass(frozen=True)
class BaseForward:
    """A forward pass of the base with everything that is hooked onto it."""

    base: BaseModel
    device: torch.device

    def begin_step(self, batches: list[MicroBatch]) -> None:
        pass

    def __call__(self, batch: MicroBatch) -> Tensor:
        batch = batch.to(self.device)
        return self.base.hidden_states(batch.input_ids, batch.position_ids, batch.segments)
