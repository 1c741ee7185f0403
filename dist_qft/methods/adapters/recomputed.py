"""Inputs of layers that are computed again for a gradient, instead of being kept for it.

An adapter's gradient needs its layer's input. Often that input is one cheap step away from what autograd keeps in any
case: `silu(gate) * up` from its factors, a norm's result from the hidden states. The step is read off autograd's graph,
whatever the model's code is, and made again with the same operations on the same values: the same bits.

A node of the graph lets go of what it has saved when its own backward pass is done, and that begins after the backward
passes of all that use its result. So an input can be made again in these, and nowhere else.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Again = Callable[[], Tensor]

_MOST_STEPS = 3  # of a chain: a norm's product with its weight, a cast, a product with the inverse deviation


def recomputation(x: Tensor) -> Again | None:
    """A function that makes x again in the backward pass of an operation on it; None if x should be kept."""
    return _again(x.grad_fn, _MOST_STEPS) if x.output_nr == 0 else None


def _again(node: Any, steps: int) -> Again | None:
    if node is None or steps == 0:
        return None
    make = _STEPS.get(node.name())
    return None if make is None else make(node, steps)


def _product(node: Any, steps: int) -> Again | None:
    left, right = _operand(node, 0, "_saved_self", steps), _operand(node, 1, "_saved_other", steps)
    if left is None or right is None:
        return None
    return lambda: torch.mul(left(), right())


def _operand(node: Any, place: int, name: str, steps: int) -> Again | None:
    """An operand of a node, as it has saved it or made again: it saves only what the other one's gradient needs."""
    if getattr(node, name) is not None:
        return lambda: getattr(node, name)
    return _again(node.next_functions[place][0], steps - 1)


def _cast(node: Any, steps: int) -> Again | None:
    source, dtype = _again(node.next_functions[0][0], steps - 1), node._input_metadata[0].dtype
    return None if source is None else lambda: source().to(dtype)


def _silu(node: Any, steps: int) -> Again:
    return lambda: F.silu(node._saved_self)


def _gelu(node: Any, steps: int) -> Again:
    return lambda: F.gelu(node._saved_self, approximate=node._saved_approximate)


_STEPS: dict[str, Callable[[Any, int], Again | None]] = {
    "MulBackward0": _product,
    "ToCopyBackward0": _cast,
    "SiluBackward0": _silu,
    "GeluBackward0": _gelu,
}
