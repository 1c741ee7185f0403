"""Eval mode for as long as a model is looked at."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class HasModes(Protocol):
    """Anything with the train and eval mode of an `nn.Module`."""

    training: bool

    def train(self, mode: bool = True) -> Any: ...


@contextmanager
def eval_mode(*modules: HasModes) -> Iterator[None]:
    """Inside, the modules are in eval mode, without dropout; afterwards each is in the mode that it was in."""
    before = [module.training for module in modules]
    for module in modules:
        module.train(False)
    try:
        yield
    finally:
        for module, mode in zip(modules, before, strict=True):
            module.train(mode)
