"""Engine `replicated`: every rank holds the whole base. For models that fit, and as the other engines' reference."""

from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_qft.config.schema import RunConfig
from dist_qft.sharding.engine import Traffic, Units, parameter_owners


class ReplicatedEngine:
    """An engine that holds the base whole on every rank; nothing of it ever crosses the network."""

    name = "replicated"
    settings: ClassVar[frozenset[str]] = frozenset()
    packages: ClassVar[tuple[str, ...]] = ()
    gathers_in_backward = False

    def __init__(self) -> None:
        self.traffic = Traffic()
        self._parameters: list[nn.Parameter] = []

    @classmethod
    def from_config(cls, config: RunConfig) -> Self:
        return cls()

    def part_bytes(self, whole: Tensor, ranks: int) -> int:
        return whole.nbytes

    def received_bytes(self, whole: Tensor, ranks: int) -> int:
        return 0

    def start(self, device: torch.device) -> None:
        pass

    def shard(self, units: Units, device: torch.device) -> None:
        for module, name in parameter_owners(units):
            whole = nn.Parameter(torch.empty_like(getattr(module, name), device=device), requires_grad=False)
            module.register_parameter(name, whole)
            self._parameters.append(whole)

    def shape(self, parameter: Tensor) -> torch.Size:
        return parameter.shape

    def rows(self, parameter: Tensor) -> tuple[int, int]:
        return 0, parameter.shape[0]

    def span(self, parameter: Tensor) -> tuple[int, int]:
        return 0, parameter.numel()

    def store(self, parameter: nn.Parameter, first: int, rows: Tensor) -> None:
        parameter.data[first : first + rows.shape[0]].copy_(rows)

    def local(self, parameter: nn.Parameter) -> Tensor:
        return parameter.data

    def sum_over_shards(self, parts: Tensor) -> Tensor:
        return parts  # every rank's part is the whole

    def release(self) -> None:
        pass

    def gather(self, parameter: nn.Parameter) -> Tensor | None:
        return parameter.data.to("cpu", copy=True) if dist.get_rank() == 0 else None

    def gathered_once(self) -> AbstractContextManager[None]:
        return nullcontext()

    def keep_gathered(self, unit: nn.Module) -> None:
        pass

    def keep_until_head(self, table: nn.Module) -> None:
        pass

    def resident_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self._parameters)

    def after_backward(self) -> None:
        pass
