"""Training from the hidden-state cache: a step whose rows are all there neither runs nor gathers the base's layers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_qft.data.batches import MicroBatch
from dist_qft.methods.forward import Forward
from dist_qft.methods.qst.hidden_cache import HiddenCache
from dist_qft.methods.qst.network import SideNetwork


class CachedForward:
    """A forward pass that runs the base and keeps its states, or the side network alone on states that were kept.

    Args:
        through_base: the forward pass through the base, with the side network attached.
        before_cached: called once, before the first step from the cache.
        mask: the attention mask that the base's layers are given at these position ids (b, L).
    """

    def __init__(
        self,
        through_base: Forward,
        side: SideNetwork,
        cache: HiddenCache,
        device: torch.device,
        before_cached: Callable[[], None],
        mask: Callable[[Tensor], Any],
    ) -> None:
        self._through_base, self._side, self._cache, self._device = through_base, side, cache, device
        self._mask = mask
        self._before_cached: Callable[[], None] | None = before_cached
        self._cached = False

    def begin_step(self, batches: list[MicroBatch]) -> None:
        """Agree with the other ranks: if one lacks a row, all must run the base, for its gathers take everybody."""
        complete = all(self._cache.has(row) for batch in batches for row in batch.row_ids)
        agreed = torch.tensor(int(complete), device=self._device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
        self._cached = bool(agreed)
        if self._cached and self._before_cached is not None:
            self._before_cached()
            self._before_cached = None

    def __call__(self, batch: MicroBatch) -> Tensor:
        if self._cached:
            rows, length = batch.input_ids.shape
            states = self._cache.read(batch.row_ids, (rows, length), self._device)
            batch = batch.to(self._device)
            return self._side(states, batch.position_ids, self._mask(batch.position_ids), segments=batch.segments)
        self._side.observer = partial(self._cache.write, batch.row_ids)
        try:
            return self._through_base(batch)
        finally:
            self._side.observer = None
