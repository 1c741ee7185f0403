"""Engine `fsdp`: PyTorch FSDP2 over packed bytes, one unit per decoder layer.

Every packed tensor (codes and constants alike, each in its own dtype) is sharded on dim 0. FSDP2 moves a unit
whose parameters have several dtypes as raw bytes, so nothing is ever cast on the way.

What one micro-batch gathers, for N ranks in a shard group (see `shard_group`) and unit sizes in padded bytes (dim 0
rounded up to a multiple of N):

    forward   (N-1)/N * (embedding + sum(layers) + root + head)   head = nothing when tied
    backward  (N-1)/N * (sum(layers) + root)                       none with reshard_after_forward=False

A tied table stays gathered from its embedding to its use as a head, which is the peak of a step in any case
(`keep_until_head`; without that it is gathered again). The head's loss needs no backward pass of its own (see
`dist_qft.base_model.loss`), and the embedding none at all: tables are freed after their use whatever
`reshard_after_forward` says, for nothing would free them later. FSDP2's default prefetch would gather the embedding
again in backward because it ran just before the first layer; the explicit order set in `shard` prevents that. An
evaluation gathers as much as a forward pass; with reshard_after_forward=False the layers then stay whole, and the next
forward pass gathers the tables alone.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, ClassVar, Self, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from dist_qft.config.schema import RunConfig
from dist_qft.ranks.collectives import all_gather_flat
from dist_qft.sharding.engine import Traffic, Units, called_as_head, parameter_owners
from dist_qft.sharding.host_memory import return_freed_memory_between
from dist_qft.sharding.shard_group import Setting, ShardGroup

_SHARDS_INTEGERS = "2.12"  # the first PyTorch whose FSDP2 takes integer parameters as they are


class CountedAllGather:
    """FSDP2's all-gather with a counter of the bytes this rank receives.

    If `__call__` returns no work, FSDP2 keeps each output until the next one has been copied out, so that streams can
    overlap. A CPU has no streams: there the work is returned done, and one output is freed before the next is made.
    """

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        started = time.perf_counter()
        on_cpu = output_tensor.device.type == "cpu"
        work = all_gather_flat(output_tensor, input_tensor, group=group, async_op=async_op or on_cpu)
        if on_cpu:
            work.wait()
        self.traffic.add(output_tensor.nbytes - input_tensor.nbytes, time.perf_counter() - started)
        return work


@contextmanager
def _integers_are_sharded() -> Iterator[None]:
    """Context in which FSDP2 makes its parameters without a gradient of their own.

    Before 2.12 PyTorch makes each with one, which integers refuse, and takes it back in the next line.
    """
    if torch.__version__ >= _SHARDS_INTEGERS:
        yield
        return
    frozen = partial(nn.Parameter, requires_grad=False)
    setattr(_fsdp_param, "nn", SimpleNamespace(**{**vars(nn), "Parameter": frozen}))  # noqa: B010
    try:
        yield
    finally:
        setattr(_fsdp_param, "nn", nn)  # noqa: B010


class FsdpEngine:
    """FSDP2 `fully_shard` per decoder layer, per table and at the decoder's root."""

    name = "fsdp"
    settings: ClassVar[frozenset[str]] = frozenset({"group", "reshard_after_forward"})
    packages: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, *, reshard_after_forward: bool = True, group: Setting = "world", timeout_seconds: float = 600
    ) -> None:
        self.traffic = Traffic()
        self._group_setting, self._timeout_seconds = group, timeout_seconds
        self.gathers_in_backward = reshard_after_forward
        self._parameters: list[nn.Parameter] = []
        self._units: dict[FSDPModule, bool] = {}  # and whether each is freed behind its forward pass
        self._at_once = False
        self._freed_by_head: RemovableHandle | None = None

    @classmethod
    def from_config(cls, config: RunConfig) -> Self:
        sharding = config.sharding
        return cls(
            reshard_after_forward=sharding.reshard_after_forward,
            group=sharding.group,
            timeout_seconds=sharding.timeout_seconds,
        )

    def part_bytes(self, whole: Tensor, ranks: int) -> int:
        return -(-whole.shape[0] // ranks) * whole[0].nbytes

    def received_bytes(self, whole: Tensor, ranks: int) -> int:
        return (ranks - 1) * self.part_bytes(whole, ranks)

    def start(self, device: torch.device) -> None:
        pass

    def shard(self, units: Units, device: torch.device) -> None:
        self._shards = ShardGroup.make(self._group_setting, device, self._timeout_seconds)
        group = self._shards.process_group or dist.group.WORLD
        assert group is not None, "the ranks are connected"
        mesh = DeviceMesh.from_group(group, device.type)
        owners = parameter_owners(units)
        counter = CountedAllGather(self.traffic)
        for unit in [*units.tables, *units.layers, units.root]:  # the root last: it takes what is left
            reshard = self.gathers_in_backward or unit in units.tables
            with _integers_are_sharded():
                sharded = fully_shard(unit, mesh=mesh, reshard_after_forward=reshard)
            sharded.set_custom_all_gather(cast(Any, counter))  # `AllGather`, its interface, is private
            self._units[sharded] = reshard
        order_backward_gathers(units)
        if device.type == "cuda":
            order_forward_gathers(units)
        for module, name in owners:
            part = nn.Parameter(torch.empty_like(getattr(module, name), device=device), requires_grad=False)
            module.register_parameter(name, part)
            self._parameters.append(part)
        if device.type == "cpu":
            return_freed_memory_between(units.layers)

    def shape(self, parameter: Tensor) -> torch.Size:
        return parameter.shape

    def rows(self, parameter: Tensor) -> tuple[int, int]:
        height, chunk = parameter.shape[0], self._rows_per_rank(parameter)
        first = min(self._shards.rank * chunk, height)
        return first, min(first + chunk, height)

    def span(self, parameter: Tensor) -> tuple[int, int]:
        begin, end = self.rows(parameter)
        width = math.prod(parameter.shape[1:])
        return begin * width, end * width

    def store(self, parameter: nn.Parameter, first: int, rows: Tensor) -> None:
        begin, end = self.rows(parameter)
        start, stop = max(begin, first), min(end, first + rows.shape[0])
        if start < stop:
            self.local(parameter)[start - begin : stop - begin].copy_(rows[start - first : stop - first])

    def local(self, parameter: nn.Parameter) -> Tensor:
        return cast(DTensor, parameter).to_local()

    def sum_over_shards(self, parts: Tensor) -> Tensor:
        dist.all_reduce(parts, group=self._shards.process_group)
        return parts

    def release(self) -> None:
        for unit in self._units:
            unit.reshard()

    def gather(self, parameter: nn.Parameter) -> Tensor | None:
        shards = self._shards
        if not shards.has_rank_0:
            return None
        # Equal parts, as gloo and NCCL both want them; the last ranks' own may be short or empty. Sent as bytes.
        part, chunk = self.local(parameter), self._rows_per_rank(parameter)
        padded = part.new_zeros((chunk, *parameter.shape[1:]))
        padded[: part.shape[0]].copy_(part)
        if shards.rank != 0:
            dist.gather(padded.view(torch.uint8), group=shards.process_group)
            return None
        whole = padded.new_empty((shards.size * chunk, *parameter.shape[1:]))
        pieces = list(whole.view(torch.uint8).chunk(shards.size))
        dist.gather(padded.view(torch.uint8), pieces, group=shards.process_group)
        return whole[: parameter.shape[0]].cpu()

    @contextmanager
    def gathered_once(self) -> Iterator[None]:
        for unit in self._units:
            unit.set_reshard_after_forward(False, recurse=False)
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False
            for unit, freed in self._units.items():
                unit.set_reshard_after_forward(freed, recurse=False)
            self.release()

    def keep_gathered(self, unit: nn.Module) -> None:
        self._keep(unit)
        if self._freed_by_head is not None:
            self._freed_by_head.remove()

    def keep_until_head(self, table: nn.Module) -> None:
        def free_after_head(table: nn.Module, ids: tuple[Tensor], options: dict[str, Any], output: object) -> None:
            if called_as_head(options) and not self._at_once:  # its last use in a forward pass
                _sharded(table).reshard()

        self._keep(table)
        self._freed_by_head = table.register_forward_hook(free_after_head, with_kwargs=True)

    def _keep(self, unit: nn.Module) -> None:
        sharded = _sharded(unit)
        self._units[sharded] = False
        sharded.set_reshard_after_forward(False)

    def resident_bytes(self) -> int:
        # Storages, because FSDP2 pads a short part to the size of the others.
        return sum(self.local(parameter).untyped_storage().nbytes() for parameter in self._parameters)

    def after_backward(self) -> None:
        pass

    def _rows_per_rank(self, parameter: Tensor) -> int:
        """Dim-0 entries of every rank's part but the last ones': FSDP2 cuts as `torch.chunk` does."""
        return -(-parameter.shape[0] // self._shards.size)


def _sharded(unit: nn.Module) -> FSDPModule:
    """The unit with the methods that `fully_shard` gave it."""
    return cast(FSDPModule, unit)


def order_forward_gathers(units: Units) -> None:
    """Each layer's gather is launched before the layer in front of it computes, however far behind the host is.

    For streams that overlap. A CPU has none: there it would only hold two layers at a time.
    """
    for layer, after in pairwise(map(_sharded, units.layers)):
        layer.set_modules_to_forward_prefetch([after])


def order_backward_gathers(units: Units) -> None:
    """Each unit prefetches the one before it in backward; the first layer prefetches nothing."""
    layers = [_sharded(layer) for layer in units.layers]
    _sharded(units.root).set_modules_to_backward_prefetch([layers[-1]])
    for before, layer in pairwise(layers):
        layer.set_modules_to_backward_prefetch([before])
    # An empty list means FSDP2's default order, which is the embedding; naming itself is a no-op.
    layers[0].set_modules_to_backward_prefetch([layers[0]])
