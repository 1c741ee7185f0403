"""The token ids that both sides train on: random, the same for the same global row."""

import torch
from torch import Tensor

from dist_qft.base_model.loss import IGNORED
from dist_qft.data.batches import MicroBatch


def random_ids(vocabulary: int, rows: int, length: int, index: int) -> Tensor:
    """(rows, length) int64, a function of the global micro-batch index."""
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(index))


def micro_batch(ids: Tensor, index: int) -> MicroBatch:
    """Causal language modelling on every token of `ids` (b, L)."""
    rows, length = ids.shape
    targets = torch.full_like(ids, IGNORED)
    targets[:, :-1] = ids[:, 1:]
    positions = torch.arange(length).expand(rows, -1)
    return MicroBatch.of(ids, targets, positions, index)
