"""Freed host memory goes back to the system when it is asked to, and in training forward passes alone."""

import ctypes

import psutil
import pytest
import torch
from torch import nn

from dist_qft.sharding.host_memory import return_freed_memory, return_freed_memory_between

BLOCK = 64 * 1024  # below every threshold from which glibc maps a block by itself
COUNT = 2048

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")


class Holes(nn.Module):
    """Leaves every second of many blocks free, as a layer leaves its temporaries among what is kept."""

    def forward(self, kept: list[torch.Tensor]) -> list[torch.Tensor]:
        blocks = [torch.ones(BLOCK // 4) for _ in range(COUNT)]
        return kept + blocks[::2]


@pytest.mark.parametrize("training", [True, False])
def test_holes_are_given_back_while_activations_pile_up(training):
    layers = [Holes() for _ in range(4)]
    return_freed_memory_between(layers)
    return_freed_memory()
    before, kept = psutil.Process().memory_info().rss, []
    with torch.set_grad_enabled(training):
        for layer in layers:
            kept = layer(kept)
    grown = (psutil.Process().memory_info().rss - before) / sum(block.nbytes for block in kept)
    # Without trimming the last layer's holes remain, as do those that blocks of the same size could not fill.
    assert grown < 1.1 if training else grown > 1.2
