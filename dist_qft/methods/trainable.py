"""What every kind of trainables offers, whatever it is: the one seam between the methods and the rest.

A `Plan` is decided from shapes alone, before any weight is read; it builds a `TrainableSet`, which hooks onto the base
from outside and from then on takes part in every call of the base. Who trains, evaluates, generates or saves sees
nothing else of a method.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from dist_qft.errors import UserError


class TrainableSet(Protocol):
    """Trainable parameters beside a frozen base; also an `nn.Module` with its own train and eval mode."""

    def named_tensors(self) -> list[tuple[str, nn.Parameter]]:
        """Every trainable, fp32, in the order of the forward pass: a part of the checkpoint contract."""

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy values into the parameters; UserError unless names and shapes are those of `named_tensors`."""

    def attach(self, model: PreTrainedModel) -> Any:
        """Hook onto a base: its last hidden states are from now on those of the tuned model."""

    def disabled(self) -> AbstractContextManager[None]:
        """Inside, the hooked model is the base model."""

    def train(self, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...

    def to(self, device: torch.device) -> "TrainableSet": ...


class HookedTrainables(nn.Module):
    """What the kinds of `TrainableSet` share: values by name, and hooks that can be switched off."""

    def __init__(self) -> None:
        super().__init__()
        self._handles: list[RemovableHandle] = []
        self._enabled = True

    def named_tensors(self) -> list[tuple[str, nn.Parameter]]:
        """See `TrainableSet`."""
        raise NotImplementedError

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy values into the parameters, in place; names and shapes must be those of `named_tensors`.

        Raises UserError that names every missing, unexpected or misshapen tensor; nothing is changed then.
        """
        copy_tensors(dict(self.named_tensors()), tensors)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the hooked model is the base model."""
        before, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = before


class Plan(Protocol):
    """What will be trained.

    Attributes:
        peft_type: names the kind in `adapter_config.json`. Not a PEFT name: other loaders must fail loudly, not serve
            the bare base.
        backward_through_base: whether training needs the base a second time, for the backward pass.
    """

    peft_type: ClassVar[str]
    backward_through_base: ClassVar[bool]

    @property
    def parameters(self) -> int:
        """Number of trainable values."""

    def describe(self) -> dict[str, Any]:
        """JSON from which the plan can be made again; a part of `adapter_config.json`."""

    def difference(self, stored: Mapping[str, Any]) -> str | None:
        """How the plan that `stored` describes differs from this one; None if it does not."""

    def summary(self) -> str:
        """Where the trainables are, for the opening lines: "210 layers"."""

    def build(self, seed: int) -> TrainableSet:
        """Fresh trainables on the CPU, as a pure function of the seed."""


@torch.no_grad()
def copy_tensors(own: Mapping[str, nn.Parameter], given: Mapping[str, torch.Tensor]) -> None:
    """Copy `given` into the parameters of the same names, in place.

    Raises UserError that names every missing, unexpected or misshapen tensor; nothing is changed then.
    """
    faults = [f"missing {name}" for name in own if name not in given]
    faults += [f"unexpected {name}" for name in given if name not in own]
    for name, parameter in own.items():
        tensor = given.get(name)
        if tensor is not None and tensor.shape != parameter.shape:
            faults.append(f"{name} has shape {list(tensor.shape)}, need {list(parameter.shape)}")
        elif tensor is not None and not tensor.is_floating_point():
            faults.append(f"{name} has dtype {tensor.dtype}, need a floating-point type")
    if faults:
        raise UserError(f"adapter tensors do not fit: {'; '.join(faults)}")
    for name, parameter in own.items():
        parameter.copy_(given[name])
