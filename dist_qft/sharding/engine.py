"""The door to sharding: what an engine promises, and which units it may gather.

An engine owns the parameters of the frozen base and nothing else. It is given modules on the meta device,
decides which rows of every parameter this rank keeps, allocates just those, and from then on makes the
modules callable as if they were whole. It knows neither formats nor methods; trainables never pass through it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Units:
    """The modules an engine gathers and frees as one, in the order of the forward pass.

    `tables` are embedding and untied LM head: used on their own, without autograd. `layers` are the decoder
    layers. `root` is the decoder that contains the layers; its remaining parameters (final norm, learned
    positions) form the last unit.
    """

    tables: list[nn.Module]
    layers: list[nn.Module]
    root: nn.Module


@dataclass
class Traffic:
    """Bytes of base this rank has received in gathers so far, their number, and the seconds spent in them.

    On CUDA a gather is only launched when it is counted: its seconds are then those of the launch.
    """

    gathered_bytes: int = 0
    gathers: int = 0
    seconds: float = 0.0

    def add(self, received: int, seconds: float) -> None:
        self.gathered_bytes += received
        self.gathers += 1
        self.seconds += seconds


class Engine(Protocol):
    """How a frozen base lives on the ranks. `shard`, `sum_over_shards` and `gather` are collective."""

    name: str
    traffic: Traffic

    def shard(self, units: Units, device: torch.device) -> None:
        """Take modules on meta, allocate this rank's part of every parameter on `device`."""

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        """The shape of the whole parameter, which an engine need not leave on the parameter itself."""

    def rows(self, parameter: nn.Parameter) -> tuple[int, int]:
        """First and one-past-last dim-0 index that this rank must be given of `parameter`."""

    def span(self, parameter: nn.Parameter) -> tuple[int, int]:
        """First and one-past-last element of `local`, counted through the whole parameter."""

    def store(self, parameter: nn.Parameter, first: int, rows: Tensor) -> None:
        """Keep what is this rank's of `rows`, which hold dim-0 entries `first`, `first + 1`, ... of `parameter`."""

    def local(self, parameter: nn.Parameter) -> Tensor:
        """This rank's part of `parameter` (a view, padding excluded), for digests and shard-wise work."""

    def sum_over_shards(self, parts: Tensor) -> Tensor:
        """Sum, over the whole base, of integers that each rank computed on its own part (wrapping, in place)."""

    def release(self) -> None:
        """Free what forward passes have left gathered; then every module holds the parameters that were sharded."""

    def gather(self, parameter: nn.Parameter) -> Tensor | None:
        """The whole parameter on rank 0 (a copy on the CPU), None elsewhere."""

    def keep_gathered(self, unit: nn.Module) -> None:
        """Keep a unit whole on every rank from its next use on: for one that is all that is still used."""

    def keep_until_head(self, table: nn.Module) -> None:
        """Where the engine can: gather the table of embedding and head once per forward pass, not for each of them."""

    def resident_bytes(self) -> int:
        """Bytes of base parameters this rank holds between forward passes."""

    def after_backward(self) -> None:
        """To be called after each backward pass: free what the engine could not free within it."""


def called_as_head(options: Mapping[str, Any]) -> bool:
    """Whether a vocabulary table is called, with these keyword arguments, as a head and not as an embedding."""
    return options.get("use") is not None


def parameter_owners(units: Units) -> list[tuple[nn.Module, str]]:
    """(module, attribute) of every parameter of the units, each once, in a fixed order."""
    seen: set[int] = set()
    owners = []
    for unit in [units.root, *units.tables]:
        for module in unit.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    owners.append((module, name))
    return owners
