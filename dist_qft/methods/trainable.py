"""The contract of every kind of trainables: the one seam between the methods and the rest.

A `TrainableSpec` is made from shapes alone, before any weight is read. It builds a `TrainableSet`, which hooks onto the
base from outside and from then on takes part in every call of the base. Training, evaluation, generation and
checkpoints see nothing else of a method.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from dist_qft.base_model.skeleton import BaseModel
from dist_qft.base_model.sources import TensorSource
from dist_qft.data.dataset import TokenDataset
from dist_qft.errors import UserError
from dist_qft.methods.forward import BaseForward, Forward


class TrainableSet(Protocol):
    """Trainable parameters beside a frozen base; also an `nn.Module` with its own train and eval mode.

    Attributes:
        leaves_base_states: True if the base's layers compute as if nothing were hooked onto them.
        changes_embedding: True if what the embedding returns is not the base's.
        training: True in train mode.
    """

    training: bool

    @property
    def leaves_base_states(self) -> bool: ...

    @property
    def changes_embedding(self) -> bool: ...

    def named_tensors(self) -> list[tuple[str, nn.Parameter]]:
        """Every trainable, fp32, in the order of the forward pass: a part of the checkpoint contract."""

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy values into the parameters; UserError unless names and shapes are those of `named_tensors`."""

    def attach(self, model: PreTrainedModel) -> Any:
        """Hook onto a base: its last hidden states are from now on those of the tuned model."""

    def make_inputs_again(self) -> None:
        """Keep nothing for gradients that is cheap to compute again; not with checkpointed activations."""

    def disabled(self) -> AbstractContextManager[None]:
        """Context in which the hooked model is the base model."""

    def detach(self) -> None:
        """Remove the hooks: the base computes as if it had never been touched."""

    def train(self, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...

    def to(self, device: torch.device) -> "TrainableSet": ...


SetT = TypeVar("SetT", bound=TrainableSet)


class HookedTrainables(nn.Module):
    """Base class of the kinds of `TrainableSet`: values by name, and hooks that can be switched off."""

    leaves_base_states = False
    changes_embedding = False

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

    def make_inputs_again(self) -> None:
        """See `TrainableSet`; here nothing is."""

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Context in which the hooked model is the base model."""
        before, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = before

    def detach(self) -> None:
        """Remove the hooks: the base computes as if it had never been touched."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


@dataclass(frozen=True)
class Counts:
    """Trainable parameters of a spec.

    Attributes:
        by_part: layer type, or part of a side network -> parameters.
        by_depth: parameters of each decoder layer, from the first.
        rows: one table row for each kind of adapter or part; all rows have the same keys.
    """

    by_part: dict[str, int]
    by_depth: list[int]
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class TrainingParts(Generic[SetT]):
    """The parts that a spec may use to run the tuned model during training.

    Attributes:
        keep_head: from the next use on, keep the vocabulary weights of the loss gathered on every rank. For training
            that needs nothing else of the base.
    """

    base: BaseModel
    trainables: SetT
    data: TokenDataset
    output_dir: Path
    device: torch.device
    keep_head: Callable[[], None]


def section(stored: object, key: str) -> Mapping[str, Any]:
    """The object under a key of a stored description; empty if there is none, or a value of another kind."""
    found = stored.get(key) if isinstance(stored, Mapping) else None
    return found if isinstance(found, Mapping) else {}


class TrainableSpec(ABC, Generic[SetT]):
    """A description of trainables beside a base, decided from shapes alone.

    Attributes:
        peft_type: names the kind in `adapter_config.json`. Not a PEFT name: other loaders must fail loudly, not serve
            the bare base.
        backward_through_base: True if the backward pass needs the base's weights a second time.
        title: heading of the rows of `counts`.
    """

    peft_type: ClassVar[str]
    backward_through_base: ClassVar[bool]
    title: ClassVar[str]

    @property
    @abstractmethod
    def parameters(self) -> int:
        """Number of trainable values."""

    def names(self) -> list[str]:
        """The names of all trainables, in the order of `TrainableSet.named_tensors`."""
        return [name for name, _ in self.build(0).named_tensors()]

    @property
    def leaves_base_clean(self) -> bool:
        """True if a base can serve another run once the trainables are detached from it."""
        return True

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """JSON from which the spec can be made again; a part of `adapter_config.json`."""

    @abstractmethod
    def difference(self, stored: Mapping[str, Any]) -> str | None:
        """The difference of the spec that `stored` describes from this one, in words; None if there is none."""

    def starting_values(
        self, stored: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], where: str
    ) -> Mapping[str, torch.Tensor]:
        """The values, by name, with which these trainables begin as those that `stored` describes have ended.

        Raises:
            UserError: they cannot; the message begins with `where`.
        """
        if difference := self.difference(stored):
            raise UserError(f"{where}: {difference}")
        return tensors

    @abstractmethod
    def summary(self) -> str:
        """The place of the trainables, for the opening lines: "210 layers"."""

    def warnings(self, base: BaseModel) -> list[str]:
        """Warnings of settings that this base allows but are probably not meant; each starts with a config key."""
        return []

    @abstractmethod
    def counts(self, base: BaseModel) -> Counts:
        """Trainable parameters by part and by depth, for the plan of a run."""

    @abstractmethod
    def build(self, seed: int) -> SetT:
        """Fresh trainables on the CPU, as a pure function of the seed."""

    def start_from_base(self, trainables: SetT, base: BaseModel, source: TensorSource) -> None:
        """Give fresh trainables starting values that depend on the base's weights. Rank 0 calls this alone."""

    def disk_notes(self, output_dir: Path, base: BaseModel, data: TokenDataset) -> list[str]:
        """Lines on the files that training will keep on disk besides checkpoints.

        Raises:
            UserError: the disk has no room for it.
        """
        return []

    def forward(self, parts: TrainingParts[SetT]) -> Forward:
        """The forward pass by which training gets the last hidden states of a micro-batch."""
        return BaseForward(parts.base, parts.device)


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
            faults.append(f"{name} has shape {list(tensor.shape)}, must be {list(parameter.shape)}")
        elif tensor is not None and not tensor.is_floating_point():
            faults.append(f"{name} has dtype {tensor.dtype}, must be a floating-point type")
    if faults:
        raise UserError(f"adapter tensors do not fit: {'; '.join(faults)}")
    for name, parameter in own.items():
        parameter.copy_(given[name])
