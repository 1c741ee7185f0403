"""Triton on this machine: it builds a part of its own with a C compiler before its first kernel."""

from functools import cache
from importlib.util import find_spec

import torch


@cache
def triton_obstacle() -> str | None:
    """The reason why no Triton kernel can run here, in a few words; None if there is none, or no GPU to ask.

    Without Triton the formats' own expressions dequantize on a GPU, too: the same bits in more passes.
    """
    if find_spec("triton") is None:
        return "Triton is not installed"
    if not torch.cuda.is_available():
        return None
    try:
        from triton.runtime import driver

        driver.active.get_current_target()  # builds that part, or finds it in Triton's cache
    except Exception as error:  # a compiler's exit code, a missing header or library, an unknown driver
        return f"Triton cannot be used: {' '.join(str(error).split())[:200]}"
    return None
