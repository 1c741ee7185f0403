"""dW written into the zeros that a base keeps, for as long as no adapter changes: once, and not at every use.

Each rank rewrites its own part, so the work is 1/N of the base's and the ranks gather zeros that have dW in them
already. The zeros as they were are kept beside and put back in the end: outside of such a time the base is itself.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import torch
from torch import Tensor, nn

from dist_qft.methods.adapters.attach import AdapterSet
from dist_qft.methods.adapters.exact_fold import folded, zeros_of
from dist_qft.methods.adapters.tile_adapter import TileAdapter
from dist_qft.methods.trainable import TrainableSet
from dist_qft.quant.frozen import FrozenWeight
from dist_qft.sharding.engine import Engine


@contextmanager
def fixed_values(engine: Engine, trainables: TrainableSet) -> Iterator[None]:
    """Inside, no trainable changes; merge-aware layers find dW in the zeros that the ranks keep and gather. Collective.

    Other adapters are cast to the compute dtype once, on GPUs. The trainables are not to be `disabled` inside.
    """
    if not isinstance(trainables, AdapterSet):
        yield
        return
    layers = trainables.folded_at_use
    with ExitStack() as stack:
        stack.enter_context(trainables.cast_once())
        if layers:
            stack.enter_context(written_zeros(engine, layers))
            stack.enter_context(trainables.folded_already())
        yield


@contextmanager
def written_zeros(engine: Engine, layers: Iterable[tuple[FrozenWeight, TileAdapter]]) -> Iterator[None]:
    """Inside, the zeros of these layers have their adapters' dW, with the bits that a merge writes.

    What is gathered is freed at both ends: it holds the other zeros.
    """
    engine.release()
    before = [part for layer in layers if (part := _write(engine, *layer)) is not None]
    try:
        yield
    except BaseException:
        with suppress(RuntimeError):  # an engine that was interrupted in a pass; the first error counts
            engine.release()
        _put_back(engine, before)
        raise
    engine.release()
    _put_back(engine, before)


@torch.no_grad()
def _write(engine: Engine, layer: FrozenWeight, adapter: TileAdapter) -> tuple[nn.Parameter, Tensor] | None:
    """Write this rank's part of a layer's zeros. Returns them with a copy of the part, None if it is empty."""
    target = zeros_of(layer.format)
    parameter = getattr(layer, target.tensor)
    part = engine.local(parameter).view(-1)
    if part.numel() == 0:
        return None
    copy = part.clone()
    start, _ = engine.span(parameter)
    width = layer.weight_shape[1] // target.block[1]
    part.copy_(folded(copy, start, width, target.block, adapter)[0])
    return parameter, copy


@torch.no_grad()
def _put_back(engine: Engine, before: list[tuple[nn.Parameter, Tensor]]) -> None:
    # The parts are asked for again: FSDP2's first forward pass moves short ones to larger storage.
    for parameter, copy in before:
        engine.local(parameter).view(-1).copy_(copy)
