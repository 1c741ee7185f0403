"""Return freed host memory to the system: by default glibc keeps blocks that were freed, and they count as in use.

On a machine with glibc 2.36 a sharded training step on CPUs needs 550 MiB of blocks at its end of a forward pass, and
holds 1,000: torch asks for aligned blocks, for which glibc before 2.38 does not reuse a hole of the same size
(its bug 14581), and every thread may have a heap of its own. Figures: docs/performance.md. Elsewhere nothing happens.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

_TRIMS_PER_PASS = 5
_M_ARENA_MAX = -8  # malloc.h


def return_freed_memory() -> None:
    """Give freed memory back to the system: glibc keeps blocks of up to 32 MiB, which add up to several shards."""
    _ask_glibc("malloc_trim", 0)


def keep_one_heap() -> None:
    """Let threads that start from now on share the main thread's heap; by default each may have its own, with its own
    holes."""
    _ask_glibc("mallopt", _M_ARENA_MAX, 1)


def return_freed_memory_between(layers: Sequence[nn.Module]) -> None:
    """Return freed memory a few times in each forward pass that keeps activations, while these pile up.

    A page that is given back costs time when it is next used: worth it where the base is sharded to save memory.
    """
    every = -(-len(layers) // _TRIMS_PER_PASS)

    def trim(*_: Any) -> None:
        if torch.is_grad_enabled():
            return_freed_memory()

    for layer in layers[every - 1 :: every]:
        layer.register_forward_hook(trim)


def _ask_glibc(name: str, *arguments: int) -> None:
    """Call a function of the C library, if this one has it."""
    function = getattr(ctypes.CDLL(None), name, None)
    if function is not None:
        function(*arguments)
