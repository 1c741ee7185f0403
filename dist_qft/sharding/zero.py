"""Engine `zero`: DeepSpeed ZeRO-3 over packed bytes. No other file but `deepspeed_start` imports DeepSpeed.

Only the frozen base goes through ZeRO-3; trainables, their reduction and the optimizer stay ours, so of DeepSpeed this
takes the partitioning and its hooks (`DeepSpeedZeRoOffload`) and no training engine. A parameter is cut flat, over all
its elements, into N equal parts, each in its own dtype: nothing is cast on the way, NaN-looking bytes survive. A
decoder layer is gathered as one ("leaf module"), a vocabulary table and each module of the rest on its own.

What one micro-batch gathers, for N ranks in a shard group (see `shard_group`) and sizes in bytes, each tensor's
elements rounded up to a multiple of N:

    forward   (N-1)/N * (embedding + sum(layers) + rest + head)   head = nothing when tied
    backward  (N-1)/N * (sum(layers) + rest)

A tied table stays gathered from its embedding to its use as a head (`keep_until_head`; without that it is gathered
again).

DeepSpeed's defaults keep a gathered parameter whole when it is small, or used again within 1e9 elements: on most models
that undoes the sharding, so both thresholds are 0 here. Its prefetch also keeps the parameters it passes over, and is
therefore limited to `prefetch_bytes`; with 0 there is no prefetch, and DeepSpeed records no order of modules.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, ClassVar, Protocol, Self, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_qft.config.deepspeed_file import read_zero_options
from dist_qft.config.schema import RunConfig
from dist_qft.errors import UserError
from dist_qft.ranks.collectives import everywhere
from dist_qft.sharding.deepspeed_start import gpu_as_local_rank, start_deepspeed
from dist_qft.sharding.engine import TimedHandle, Traffic, Units, called_as_head, parameter_owners
from dist_qft.sharding.host_memory import return_freed_memory_between
from dist_qft.sharding.shard_group import Setting, ShardGroup

AllGather = Callable[..., Any]
_UNTIL_HEAD, _AT_ONCE = -1, -2  # the ids of no modules, among those that use a parameter


class _ZeroParameter(Protocol):
    """The attributes that DeepSpeed hangs on a parameter, as far as they are used here."""

    ds_shape: torch.Size
    ds_numel: int
    ds_numel_aligned: int  # rounded up to a multiple of the ranks
    ds_tensor: Tensor  # this rank's part, flat; of equal size on all ranks
    ds_persist: bool
    ds_active_sub_modules: set[int]  # ids of the modules that are using it: it stays gathered until there is none
    all_gather_coalesced: AllGather


def _zero(parameter: Tensor) -> _ZeroParameter:
    return cast(_ZeroParameter, parameter)


class ZeroEngine:
    """ZeRO-3 partitioning of the frozen base alone, gathered per decoder layer and per table.

    Args:
        prefetch_bytes: how much of the base may be gathered ahead of its use, besides the unit in use.
        offload: keep this rank's part in host memory, page-locked by default (CUDA only).
        options: `zero_optimization` settings that are the user's to choose, such as overlap_comm.
    """

    name = "zero"
    settings: ClassVar[frozenset[str]] = frozenset({"group", "prefetch_megabytes", "offload", "deepspeed_config"})
    packages: ClassVar[tuple[str, ...]] = ("deepspeed",)
    gathers_in_backward = True

    def __init__(
        self,
        *,
        prefetch_bytes: int = 0,
        offload: bool = False,
        options: Mapping[str, Any] | None = None,
        group: Setting = "world",
        timeout_seconds: float = 600,
    ) -> None:
        self.traffic = Traffic()
        self._group_setting, self._timeout_seconds = group, timeout_seconds
        self.prefetch_bytes = prefetch_bytes
        self.offload = offload
        self.options = dict(options or {})
        self._parameters: list[nn.Parameter] = []

    @classmethod
    def from_config(cls, config: RunConfig) -> Self:
        sharding = config.sharding
        return cls(
            prefetch_bytes=int(sharding.prefetch_megabytes * 2**20),
            offload=sharding.offload,
            options=read_zero_options(config),
            group=sharding.group,
            timeout_seconds=sharding.timeout_seconds,
        )

    def part_bytes(self, whole: Tensor, ranks: int) -> int:
        return -(-whole.numel() // ranks) * whole.itemsize

    def received_bytes(self, whole: Tensor, ranks: int) -> int:
        return (ranks - 1) * self.part_bytes(whole, ranks)

    def start(self, device: torch.device) -> None:
        if find_spec("deepspeed") is None:
            remedy = "pip install 'dist-qft[deepspeed]'"
            raise everywhere(UserError(f"sharding.engine: zero needs DeepSpeed, which is not installed; {remedy}"))
        start_deepspeed(device)

    def shard(self, units: Units, device: torch.device) -> None:
        if self.offload and device.type == "cpu":
            raise everywhere(UserError("sharding.offload: on a CPU the base is in host memory already; remove it"))
        self.start(device)
        from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
        from deepspeed.runtime.zero.partition_parameters import Init
        from deepspeed.utils import set_z3_leaf_module
        from deepspeed.utils.timer import NoopTimer

        self._device = device
        self._shards = ShardGroup.make(self._group_setting, device, self._timeout_seconds)
        # The batch size means nothing without a training engine, but DeepSpeed wants one.
        zero = {"stage": 3, "memory_efficient_linear": False, **self.options}
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
        with gpu_as_local_rank(device):
            partitioner = Init(config_dict_or_path=config, data_parallel_group=self._shards.process_group)
        for module, name in parameter_owners(units):
            part = self._partition(partitioner, getattr(module, name), device)
            module.register_parameter(name, part)
            self._parameters.append(part)
        for layer in units.layers:
            set_z3_leaf_module(layer, True)
        inside = set(units.root.modules())
        prefetched = self._elements(self.prefetch_bytes)
        # The unit in use, and beside it a table that is kept until the head.
        in_use = max(map(_elements_of, units.layers)) + max(map(_elements_of, units.tables))
        self._zero = DeepSpeedZeRoOffload(
            nn.ModuleList([units.root, *(table for table in units.tables if table not in inside)]),
            timers=NoopTimer(),
            ds_config=config,
            overlap_comm=self.options.get("overlap_comm", prefetched > 0),
            prefetch_bucket_size=prefetched,
            max_live_parameters=prefetched + in_use,
            max_reuse_distance=0,
            param_persistence_threshold=0,
        )
        if prefetched:
            # The recorded order of modules starts anew with each pass through the decoder, before its own hooks.
            begin = self._zero.get_param_coordinator().reset_step
            units.root.register_forward_pre_hook(gpu_as_local_rank(device)(lambda *_: begin()), prepend=True)
        if device.type == "cpu":
            return_freed_memory_between(units.layers)

    def shape(self, parameter: Tensor) -> torch.Size:
        return _zero(parameter).ds_shape

    def rows(self, parameter: Tensor) -> tuple[int, int]:
        begin, end = self.span(parameter)
        width = math.prod(_zero(parameter).ds_shape[1:])
        return begin // width, -(-end // width)

    def span(self, parameter: Tensor) -> tuple[int, int]:
        size = _zero(parameter).ds_tensor.numel()
        begin = min(self._shards.rank * size, _zero(parameter).ds_numel)
        return begin, min(begin + size, _zero(parameter).ds_numel)

    def store(self, parameter: nn.Parameter, first: int, rows: Tensor) -> None:
        begin, end = self.span(parameter)
        offset = first * math.prod(_zero(parameter).ds_shape[1:])
        start, stop = max(begin, offset), min(end, offset + rows.numel())
        if start < stop:
            self.local(parameter)[start - begin : stop - begin].copy_(rows.reshape(-1)[start - offset : stop - offset])

    def local(self, parameter: nn.Parameter) -> Tensor:
        begin, end = self.span(parameter)
        return _zero(parameter).ds_tensor[: end - begin]

    def sum_over_shards(self, parts: Tensor) -> Tensor:
        dist.all_reduce(parts, group=self._shards.process_group)
        return parts

    def gather(self, parameter: nn.Parameter) -> Tensor | None:
        # Sent as bytes, and from the GPU: NCCL does not reach a part that is kept in host memory.
        shards, part = self._shards, _zero(parameter).ds_tensor.to(self._device)
        if not shards.has_rank_0:
            return None
        if shards.rank != 0:
            dist.gather(part.view(torch.uint8), group=shards.process_group)
            return None
        whole = part.new_empty(shards.size * part.numel())
        pieces = list(whole.view(torch.uint8).chunk(shards.size))
        dist.gather(part.view(torch.uint8), pieces, group=shards.process_group)
        return whole[: _zero(parameter).ds_numel].view(_zero(parameter).ds_shape).cpu()

    def release(self) -> None:
        self._zero.partition_all_parameters()

    @contextmanager
    def gathered_once(self) -> Iterator[None]:
        for parameter in self._parameters:
            _zero(parameter).ds_active_sub_modules.add(_AT_ONCE)
        try:
            yield
        finally:
            for parameter in self._parameters:
                _zero(parameter).ds_active_sub_modules.discard(_AT_ONCE)
            self.release()

    def keep_gathered(self, unit: nn.Module) -> None:
        for parameter in unit.parameters():
            _zero(parameter).ds_persist = True

    def keep_until_head(self, table: nn.Module) -> None:
        def hold(table: nn.Module, ids: tuple[Tensor], options: dict[str, Any]) -> None:
            for parameter in table.parameters():
                _zero(parameter).ds_active_sub_modules.add(_UNTIL_HEAD)

        def let_go(table: nn.Module, ids: tuple[Tensor], options: dict[str, Any], output: object) -> None:
            if called_as_head(options):
                for parameter in table.parameters():
                    _zero(parameter).ds_active_sub_modules.discard(_UNTIL_HEAD)

        # In front of DeepSpeed's hook behind the call, which frees what no module is using.
        table.register_forward_pre_hook(hold, with_kwargs=True)
        table.register_forward_hook(let_go, prepend=True, with_kwargs=True)

    def resident_bytes(self) -> int:
        return sum(_zero(parameter).ds_tensor.nbytes for parameter in self._parameters)

    def after_backward(self) -> None:
        # The first layer's input needs no gradient, so DeepSpeed's own hook behind its backward pass never fires.
        self._zero.release_backward_leftovers()

    def _partition(self, partitioner: Any, meta: nn.Parameter, device: torch.device) -> nn.Parameter:
        """This rank's part of a parameter on meta, uninitialised, with DeepSpeed's bookkeeping around it.

        DeepSpeed's own way makes the whole tensor first and sends it from rank 0; this sets the same attributes.
        """
        from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
        from deepspeed.runtime.zero.partition_parameters import free_param

        # One element stands for all of them, to show DeepSpeed the shape.
        stand_in = torch.empty((), dtype=meta.dtype, device=device).expand(meta.shape)
        parameter = nn.Parameter(stand_in, requires_grad=False)
        partitioner._convert_to_deepspeed_param(parameter)
        size = -(-meta.numel() // self._shards.size)
        pinned = self.offload and self.options.get("offload_param", {}).get("pin_memory", True)
        part = torch.empty(size, dtype=meta.dtype, device="cpu" if self.offload else device, pin_memory=pinned)
        for name, value in {
            "ds_numel": size,
            "status": PartitionedParamStatus.AVAILABLE,
            "final_location": None,
        }.items():
            setattr(part, name, value)
        zero = _zero(parameter)
        zero.ds_tensor, zero.ds_numel_aligned = part, self._shards.size * size
        free_param(parameter)
        zero.all_gather_coalesced = self._counted(zero.all_gather_coalesced)
        return parameter

    def _counted(self, all_gather: AllGather) -> AllGather:
        """DeepSpeed's gather of some parameters, counting this rank's received bytes and waiting time."""
        peers = self._shards.size - 1

        def counted(parameters: Iterable[nn.Parameter], **arguments: Any) -> "TimedHandle":
            parameters = list(parameters)
            started = time.perf_counter()
            handle = all_gather(parameters, **arguments)
            received = peers * sum(_zero(parameter).ds_tensor.nbytes for parameter in parameters)
            self.traffic.add(received, time.perf_counter() - started)
            return TimedHandle(handle, self.traffic)

        return counted

    def _elements(self, count: int) -> int:
        """Bytes in DeepSpeed's unit, elements of any dtype, by the average over the base."""
        total = sum(_zero(parameter).ds_tensor.nbytes for parameter in self._parameters)
        return count * sum(_zero(parameter).ds_tensor.numel() for parameter in self._parameters) // total


def _elements_of(unit: nn.Module) -> int:
    return sum(_zero(parameter).ds_numel for parameter in unit.parameters())
