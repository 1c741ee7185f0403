"""From a config to live parts: what training, evaluation, generation and merging all begin with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_qft.base_model.load import load_base
from dist_qft.base_model.skeleton import BaseModel
from dist_qft.base_model.sources import TensorSource
from dist_qft.base_model.weight_files import open_source
from dist_qft.config.schema import RunConfig
from dist_qft.data.dataset import TokenDataset
from dist_qft.errors import Preempted
from dist_qft.methods.forward import BaseForward, Forward
from dist_qft.methods.qst.cached_forward import CachedForward
from dist_qft.methods.qst.hidden_cache import CacheLayout, HiddenCache, require_space
from dist_qft.methods.qst.pruning import start_from_base
from dist_qft.methods.trainable import Plan, TrainableSet
from dist_qft.ranks.preemption import StopSignal
from dist_qft.sharding.engine import Engine
from dist_qft.sharding.engines import engine_of
from dist_qft.sharding.host_memory import keep_one_heap
from dist_qft.tuned_model.task import Task, head_outputs, make_task

# Measured on CPUs: with 64 the step takes 5 % more time and 100 MiB more (docs/performance.md).
_LOSS_CHUNK_MEGABYTES = {"cuda": 64.0, "cpu": 8.0}


@dataclass(frozen=True)
class Assembled:
    """A loaded base with its adapters (or its side network) attached, and the task with what it trains itself."""

    base: BaseModel
    engine: Engine
    trainables: TrainableSet
    task: Task

    def named_tensors(self) -> list[tuple[str, nn.Parameter]]:
        """Every trainable in the order of the forward pass."""
        return [*self.trainables.named_tensors(), *self.task.named_tensors()]

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy values into the trainables; UserError unless names and shapes are those of `named_tensors`."""
        of_task = {name: tensors[name] for name, _ in self.task.named_tensors() if name in tensors}
        self.task.load_tensors(of_task)
        self.trainables.load_tensors({name: tensor for name, tensor in tensors.items() if name not in of_task})


def start_fresh(config: RunConfig, parts: Assembled) -> None:
    """With `method.init: pruned`, start the side network from the base's weights.

    On rank 0 alone: the others' trainables are made equal to its own before they are used.
    """
    if config.method.init == "pruned" and dist.get_rank() == 0:
        start_from_base(parts.trainables, parts.base, open_source(config.model))


def make_forward(config: RunConfig, parts: Assembled, plan: Plan, data: TokenDataset, device: torch.device) -> Forward:
    """How training runs the model: through the base, or with `method.cache` from its stored hidden states."""
    through_base = BaseForward(parts.base, device)
    if config.method.cache != "disk":
        return through_base
    layout = CacheLayout.of(plan, parts.base.dtype)
    base, folder = parts.base, cache_folder(config)
    cache = HiddenCache(folder, layout, data.lengths, base=base.fingerprint, data=data.digest)
    base.notes.append(f"hidden-state cache {folder}: {cache.filled:,} of {len(data):,} rows are there")
    keep_head = partial(parts.engine.keep_gathered, base.units.tables[-1])  # all that a cached step needs of the base
    return CachedForward(through_base, parts.trainables, cache, device, keep_head)


def check_cache(config: RunConfig, plan: Plan, base: BaseModel, data: TokenDataset) -> list[str]:
    """A line on the hidden-state cache that the config asks for, if any. UserError if the disk has no room for it."""
    if config.method.cache != "disk":
        return []
    size, folder = CacheLayout.of(plan, base.dtype).bytes_of(data.lengths), cache_folder(config)
    require_space(folder, size)
    return [f"hidden-state cache {folder}: {size / 2**30:,.2f} GiB for {len(data):,} rows"]


def cache_folder(config: RunConfig) -> Path:
    """Where a run keeps hidden states."""
    return Path(config.output_dir) / "hidden_cache"


def assemble(
    config: RunConfig,
    skeleton: BaseModel,
    plan: Plan,
    device: torch.device,
    source: TensorSource | None = None,
    stop: StopSignal | None = None,
) -> Assembled:
    """Shard and load the base, build the trainables and hook them on. Collective; the heavy part of a start.

    `source` holds the base's weights; without it, `model.path` is opened here.

    Raises:
        Preempted: some rank was asked to `stop`.
    """

    def poll() -> None:
        if stop is not None and stop.any_rank():
            raise Preempted("stopped by a signal while the base was loaded; start it again")

    engine = engine_of(config)
    materialize(skeleton, source or open_source(config.model), engine, device, poll)
    if skeleton.tied and head_outputs(config.task) == 0:
        engine.keep_until_head(skeleton.embedding)
    return attach_trainables(config, skeleton, engine, plan, device)


def attach_trainables(
    config: RunConfig, base: BaseModel, engine: Engine, plan: Plan, device: torch.device
) -> Assembled:
    """Build the trainables and hook them onto a loaded base that has none."""
    base.head.loss_megabytes = config.train.loss_chunk_megabytes or _LOSS_CHUNK_MEGABYTES[device.type]
    adapters = plan.build(config.train.seed).to(device)
    adapters.attach(base.model)
    return Assembled(base, engine, adapters, make_task(config.task, base, device))


def materialize(
    skeleton: BaseModel,
    source: TensorSource,
    engine: Engine,
    device: torch.device,
    poll: Callable[[], None] | None = None,
) -> None:
    """Let the engine take the skeleton, and load its weights. Collective; `poll` is that of `load_base`."""
    engine.shard(skeleton.units, device)
    if device.type == "cpu":
        keep_one_heap()
    _move_buffers(skeleton, device)
    load_base(skeleton, source, engine, device, poll)


def _move_buffers(base: BaseModel, device: torch.device) -> None:
    for module in base.model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
