"""One rank of a run of any size, without the others: the sharding and the training step of the package itself.

torch's fake process group stands for the network: its collectives return at once, and nobody else is there. With fake
tensors, which have shapes and no values, models are run that no machine here could hold. Four things are replaced:
reading weights (there are none), reading values from tensors (all are 0 then, and finite), the process group's backend,
and the placing of modules that are in place already. All else is the code that runs on a cluster.
"""

import dataclasses
import os
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_qft.base_model.skeleton import BaseModel
from dist_qft.bench.batches import micro_batch
from dist_qft.config.check import accumulation_steps
from dist_qft.config.schema import RunConfig
from dist_qft.data.batches import MicroBatch
from dist_qft.methods.forward import BaseForward
from dist_qft.methods.specs import make_spec
from dist_qft.ranks.groups import new_group
from dist_qft.sharding import fsdp
from dist_qft.training.activations import choose_activations
from dist_qft.training.run_plan import RunPlan
from dist_qft.training.train_step import TrainStep, make_train_step
from dist_qft.tuned_model.assemble import assemble
from tests.support.collectives import Recorder

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Rehearsal:
    """A training step of one rank.

    Attributes:
        micro_batches: for each, the collectives (group, operation, bytes of the largest tensor) up to its end.
        step: those that follow the last micro-batch, and those of the trainables' own group.
        received: bytes of the base that this rank receives in each micro-batch, from the tensors' sizes.
        memory: bytes held after the step, by the plan's names of the parts.
        passing: with fake tensors, the most bytes of tensors that the step made and held at once, without the moments:
            gathered weights, activations, workspace and what the reduction holds. No allocator's holes are in it. 0
            otherwise.
    """

    micro_batches: list[list[tuple[str, str, int]]]
    step: list[tuple[str, str, int]]
    received: list[int]
    memory: dict[str, int]
    passing: int


def planned_passing(plan: RunPlan) -> int:
    """The plan's figure for `Rehearsal.passing`."""
    return sum(plan.memory[part] for part in ("gathered", "activations", "workspace", "reduction"))


def rehearse(
    config: RunConfig, base: BaseModel, world_size: int, *, rank: int = 0, ranks_per_node: int = 8, fake: bool = False
) -> Rehearsal:
    """Shard `base`, a skeleton, and run one step as `rank` of `world_size`.

    Args:
        fake: no tensor has values.
    """
    place = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank % ranks_per_node}
    place |= {"LOCAL_WORLD_SIZE": ranks_per_node, "MASTER_ADDR": "node0", "MASTER_PORT": 29500}
    spec = make_spec(config, base)
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else None
    count = accumulation_steps(config, world_size)
    with one_of_many(rank, world_size), patch.dict(os.environ, {key: str(value) for key, value in place.items()}):
        with mode or nullcontext(), _Unread():
            parts = assemble(config, base, spec, CPU, cast(Any, object()))
            group = new_group(CPU, 1.0)
            forward = BaseForward(base, CPU)
            step = make_train_step(config, parts, forward, accumulation=count, total_steps=9, group=group)
            choose_activations(base.model, parts.trainables, config.train, CPU)
            parts.trainables.train()
        batches = [_batch(config, mode) for _ in range(count)]
        with mode or nullcontext(), _Unread(), Recorder() as recorder, LiveBytes() if fake else nullcontext() as live:
            ends = _marks_of_micro_batches(step, recorder, live, count)
            step.run(0, batches, check_digest=False)
        step.flat.close()
        return _found(recorder.log, ends, group.group_name, step, live.peak if live else 0)


def _found(log: list[tuple[str, str, int]], ends: list[int], reducing: str, step: TrainStep, passing: int) -> Rehearsal:
    """The record of the collectives, divided; the group called `reducing` is that of the trainables."""
    spans = [log[start:stop] for start, stop in zip([0, *ends], ends, strict=False)]
    of_base = [[each for each in span if each[0] != reducing] for span in spans]
    rest = [each for each in log if each[0] == reducing] + [each for each in log[ends[-1] :] if each[0] != reducing]
    flat, state = step.flat, step.optimizer.state.values()
    return Rehearsal(
        micro_batches=of_base,
        step=rest,
        received=[sum(map(_received, span)) for span in of_base],
        memory={
            "base": step.parts.engine.resident_bytes(),
            "trainables": flat._storage.nbytes,
            "gradients": flat.bytes_per_reduction,
            "moments": sum(each.nbytes for of in state for each in of.values() if each.numel() > 1),
        },
        passing=passing,
    )


def _received(collective: tuple[str, str, int]) -> int:
    """Bytes of an all-gather's output that come from other ranks."""
    group, operation, size = collective
    assert operation == "allgather_base", f"{operation} in a micro-batch"
    ranks = dist.get_world_size(dist.distributed_c10d._resolve_process_group(group))
    return size - size // ranks


def _batch(config: RunConfig, mode: FakeTensorMode | None) -> MicroBatch:
    """Rows of the longest length, every token a target."""
    assert config.data is not None
    rows = config.train.per_device_train_batch_size
    batch = micro_batch(torch.zeros(rows, config.data.max_length, dtype=torch.int64), 0)
    if mode is None:
        return batch
    segments = dataclasses.replace(batch.segments, starts=mode.from_tensor(batch.segments.starts))
    return batch._with(mode.from_tensor, segments)


def _marks_of_micro_batches(
    step: TrainStep, recorder: Recorder, live: "LiveBytes | None", accumulation: int
) -> list[int]:
    """A list that gets the length of the record at the end of each micro-batch's backward pass.

    Until the last one's, `live` counts: the optimizer's state, which the first update makes, stays outside.
    """
    ends: list[int] = []
    after_backward = step.parts.engine.after_backward

    def mark() -> None:
        after_backward()
        ends.append(len(recorder.log))
        if live is not None and len(ends) == accumulation:
            live.counting = False

    step.parts.engine.after_backward = mark  # type: ignore[method-assign]
    return ends


@contextmanager
def one_of_many(rank: int, world_size: int) -> Iterator[None]:
    """A process group of `world_size` ranks that are not there."""
    make_group = dist.new_group
    with ExitStack() as stack:
        put = stack.enter_context
        put(
            patch.object(
                dist, "new_group", lambda ranks=None, **asked: make_group(ranks, **asked | {"backend": "fake"})
            )
        )
        put(patch("dist_qft.tuned_model.assemble.load_base"))
        put(patch.object(nn.Module, "to", lambda self, *_, **__: self))
        # Cutting on the meta device makes a view per rank: thousands, which as fake tensors would take minutes.
        put(patch.object(fsdp, "fully_shard", _without_modes(fsdp.fully_shard)))
        put(patch.object(fsdp.DeviceMesh, "from_group", _without_modes(fsdp.DeviceMesh.from_group)))
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        try:
            yield
        finally:
            dist.destroy_process_group()


def _without_modes(function: Any) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        with torch._C.DisableTorchFunction(), unset_fake_temporarily():
            return function(*arguments, **options)

    return call


_READS: dict[Any, Any] = {Tensor.item: 0.0, Tensor.__float__: 0.0, Tensor.__int__: 0, Tensor.__bool__: False}


class _Unread(TorchFunctionMode):
    """Inside, every number that Python reads from a tensor is 0: nobody has computed it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist:
            return _zeros(args[0].shape)
        if func in _READS:
            return _READS[func]
        return func(*args, **(kwargs or {}))


def _zeros(shape: torch.Size) -> Any:
    return [_zeros(shape[1:]) for _ in range(shape[0])] if len(shape) else 0.0


class LiveBytes(TorchDispatchMode):
    """The bytes of the storages that operations inside have made and that are still there.

    Attributes:
        now, peak: bytes.
        counting: new storages count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.counting = True
        self._sizes: dict[int, int] = {}
        self._resizing = patch.object(torch.UntypedStorage, "resize_", self._resize(torch.UntypedStorage.resize_))

    def __enter__(self) -> "LiveBytes":
        self._resizing.start()
        return cast(LiveBytes, super().__enter__())

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._resizing.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if self.counting and func.namespace != "c10d":
            given = {each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
            for each in tree_leaves(found):
                if isinstance(each, Tensor) and each.untyped_storage()._cdata not in given:
                    self._count(each.untyped_storage())
        return found

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            weakref.finalize(storage, self._change, key, None)
            self._change(key, storage.nbytes())

    def _change(self, key: int, size: int | None) -> None:
        """A storage has another size now, or is gone."""
        self.now += (size or 0) - self._sizes.pop(key, 0)
        if size is not None:
            self._sizes[key] = size
        self.peak = max(self.peak, self.now)

    def _resize(self, resize: Any) -> Any:
        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            found = resize(storage, size)
            if storage._cdata in self._sizes:
                self._change(storage._cdata, size)
            return found

        return resized
