"""RMS norms by PyTorch's own kernel, on CUDA: one pass where a library's expression takes six, in float32.

The result is rounded to the compute dtype once; the library's expression rounds before the weight multiplies, too.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def fuse_norms(model: nn.Module) -> None:
    """Let the modules that compute w x / sqrt(mean(x^2) + eps) do it by one kernel; all others stay as they are."""
    for module in model.modules():
        if is_fusible(module):
            module.forward = partial(_normalized, module, _epsilon(module))


def is_fusible(module: nn.Module) -> bool:
    """True for a module that computes w x / sqrt(mean(x^2) + eps), or the same without w, as Gemma 4 does to values."""
    kind: Callable[..., nn.Module] = type(module)
    eps = _epsilon(module)
    if not kind.__name__.endswith("RMSNorm") or eps is None:
        return False
    if not module.state_dict():
        return _is_plain_without_weight(module, eps)
    return isinstance(getattr(module, "weight", None), Tensor) and _is_plain(kind)


def _epsilon(module: nn.Module) -> float | None:
    """The number under the root of an RMS norm, by either of its names; None if it is not a plain number."""
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return found if isinstance(found, float) else None


def _normalized(module: nn.Module, eps: float | None, x: Tensor) -> Tensor:
    weight = getattr(module, "weight", None)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


@cache
def _is_plain(kind: Callable[..., nn.Module]) -> bool:
    """True if a norm of this class gives what PyTorch's gives: others add 1 to the weight, or have a gate."""
    width, eps = 8, 1e-3
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        try:
            norm = kind(width, eps=eps)
            norm.load_state_dict({"weight": torch.randn(width)})
            x = torch.randn(3, width)
            found = norm(x)
        except (TypeError, RuntimeError):  # other arguments than a width, other values than a weight, more than x
            return False
        return torch.allclose(found, _normalized(norm, eps, x), rtol=1e-5, atol=1e-6)


def _is_plain_without_weight(norm: nn.Module, eps: float) -> bool:
    """True if a norm that has no weight, and so takes any width, gives what PyTorch's gives."""
    x = torch.linspace(-1, 2, 24, device="cpu").view(3, 8)
    with torch.no_grad():
        try:
            return torch.allclose(norm(x), F.rms_norm(x, x.shape[-1:], None, eps), rtol=1e-5, atol=1e-6)
        except (TypeError, RuntimeError, AttributeError):  # more arguments than x, or it is a norm of another kind
            return False
