"""The contract of the engines, and the units of the base that an engine gathers.

An engine owns the parameters of the frozen base and nothing else. It is given modules on the meta device,
decides which rows of every parameter this rank keeps, allocates just those, and from then on makes the
modules callable as if they were whole. It knows neither formats nor methods; trainables never pass through it.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from dist_qft.config.schema import RunConfig
from dist_qft.quant.frozen import FrozenWeight


@dataclass(frozen=True)
class Units:
    """The modules an engine gathers and frees as one, in the order of the forward pass.

    `tables` are embedding and untied LM head: used on their own, without autograd. `layers` are the decoder
    layers. `root` is the decoder that contains the layers; its remaining parameters (final norm, learned
    positions) form the last unit.
    """

    tables: Sequence[FrozenWeight]
    layers: Sequence[nn.Module]
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


class TimedHandle:
    """A gather in flight; waiting for it counts as time spent gathering."""

    def __init__(self, handle: Any, traffic: Traffic) -> None:
        self._handle, self._traffic = handle, traffic

    def wait(self, **arguments: Any) -> None:
        started = time.perf_counter()
        self._handle.wait(**arguments)
        self._traffic.seconds += time.perf_counter() - started


class Engine(Protocol):
    """The contract of an engine, which holds a frozen base. `shard`, `sum_over_shards` and `gather` are collective.

    The plan of a run asks `gathers_in_backward`, `part_bytes` and `received_bytes` of an engine that has no base yet,
    on a machine that may have one process and none of the engine's packages.

    Attributes:
        name: `sharding.engine` of the config.
        settings: keys of `config.sharding` that this engine reads and not every engine does.
        packages: those that it needs besides PyTorch.
        traffic: counts the bytes that this rank has received.
        gathers_in_backward: whether the layers are gathered a second time, for the backward pass.
    """

    name: str
    settings: ClassVar[frozenset[str]]
    packages: ClassVar[tuple[str, ...]]
    traffic: Traffic
    gathers_in_backward: bool

    @classmethod
    def from_config(cls, config: RunConfig) -> Self:
        """The engine with those settings of `config.sharding` that are its own."""

    def part_bytes(self, whole: Tensor, ranks: int) -> int:
        """Bytes that the fullest rank of a shard group of `ranks` keeps of `whole`, a tensor that may be on meta."""

    def received_bytes(self, whole: Tensor, ranks: int) -> int:
        """Bytes that each rank of a shard group of `ranks` receives when `whole` is gathered."""

    def start(self, device: torch.device) -> None:
        """Import the engine's packages and start them on the process group; `shard` does it, too.

        Raises:
            UserError: a package is not installed.
        """

    def shard(self, units: Units, device: torch.device) -> None:
        """Take modules on meta, allocate this rank's part of every parameter on `device`. Collective."""

    def shape(self, parameter: Tensor) -> torch.Size:
        """The shape of the whole parameter; `parameter.shape` may be that of a part."""

    def rows(self, parameter: Tensor) -> tuple[int, int]:
        """First and one-past-last dim-0 index that this rank must be given of `parameter`."""

    def span(self, parameter: Tensor) -> tuple[int, int]:
        """First and one-past-last element of this rank's part, in the whole parameter flattened."""

    def store(self, parameter: nn.Parameter, first: int, rows: Tensor) -> None:
        """Copy this rank's part out of `rows`, the dim-0 entries `first`, `first + 1`, ... of `parameter`."""

    def local(self, parameter: nn.Parameter) -> Tensor:
        """This rank's part of `parameter` (a view, padding excluded), for digests and shard-wise work."""

    def sum_over_shards(self, parts: Tensor) -> Tensor:
        """Sum, over the whole base, of integers that each rank computed on its own part (wrapping, in place)."""

    def release(self) -> None:
        """Free the gathers of forward passes: every module then holds its sharded parameters again."""

    def gather(self, parameter: nn.Parameter) -> Tensor | None:
        """The whole parameter on rank 0 (a copy on the CPU), None elsewhere. Only the group of rank 0 takes part."""

    def gathered_once(self) -> AbstractContextManager[None]:
        """Inside, what a forward pass has gathered serves the next ones, up to the whole base; freed in the end."""

    def keep_gathered(self, unit: nn.Module) -> None:
        """Keep `unit` whole on every rank from its next use on.

        For a unit that is the only part of the base still needed: the LM head, once all hidden states are cached.
        """

    def keep_until_head(self, table: nn.Module) -> None:
        """Gather a tied `table` once per forward pass, and not once as the embedding and once as the head."""

    def resident_bytes(self) -> int:
        """Bytes of base parameters this rank holds between forward passes."""

    def after_backward(self) -> None:
        """Free the parts that the engine could not free within the backward pass. Call it after each."""


def called_as_head(options: Mapping[str, Any]) -> bool:
    """True if these keyword arguments of a call use a vocabulary table as the LM head, not as the embedding."""
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
