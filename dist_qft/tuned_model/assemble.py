"""The live parts of a config, with which training, evaluation, generation and merging all begin."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_qft.base_model.eval_mode import eval_mode
from dist_qft.base_model.fused_norms import fuse_norms
from dist_qft.base_model.load import load_base
from dist_qft.base_model.loss import CHUNK_MEGABYTES
from dist_qft.base_model.skeleton import BaseModel
from dist_qft.base_model.sources import TensorSource
from dist_qft.base_model.weight_files import open_source
from dist_qft.config.data_schema import TaskConfig
from dist_qft.config.schema import RunConfig
from dist_qft.data.dataset import TokenDataset
from dist_qft.errors import Preempted
from dist_qft.methods.forward import Forward
from dist_qft.methods.reference import reference_beside
from dist_qft.methods.trainable import TrainableSet, TrainableSpec, TrainingParts
from dist_qft.ranks.preemption import StopSignal
from dist_qft.ranks.process import resident_peak
from dist_qft.sharding.engine import Engine
from dist_qft.sharding.engines import engine_of
from dist_qft.sharding.host_memory import keep_one_heap
from dist_qft.tuned_model.gathered_once import gathered_once
from dist_qft.tuned_model.preference import PREFERENCES
from dist_qft.tuned_model.task import CausalLM, Labelling, Task, head_outputs
from dist_qft.tuned_model.written_zeros import fixed_values


@dataclass(frozen=True)
class Assembled:
    """A loaded base model, the trainables attached to it, and the task with its own head."""

    base: BaseModel
    engine: Engine
    trainables: TrainableSet
    task: Task

    def fixed(self) -> AbstractContextManager[None]:
        """Inside, no trainable changes, so what follows from their values is computed once. Collective.

        Not where the base is run as well: it has to be without them.
        """
        return nullcontext() if self.task.needs_base else fixed_values(self.engine, self.trainables)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the trainables drop nothing out, and none of them changes. Collective."""
        with eval_mode(self.trainables), self.fixed():
            yield

    @contextmanager
    def bare(self) -> Iterator[None]:
        """Inside, the model is the base, and the task's head is as it begins: nothing trained has a part in it."""
        with self.trainables.disabled(), self.task.untrained():
            yield

    @contextmanager
    def answering(self, device: torch.device, *, tuned: bool = True) -> Iterator[None]:
        """`evaluating`, and the base is gathered once where it fits. Collective.

        Args:
            tuned: False for the base without its trainables, which are `disabled` then.
        """
        with self.evaluating() if tuned else nullcontext(), gathered_once(self.base, self.engine, device):
            yield

    def detach(self) -> None:
        """Take trainables and task off the base: it computes as if it had never been touched."""
        self.task.detach()
        self.trainables.detach()

    def named_tensors(self) -> list[tuple[str, nn.Parameter]]:
        """Every trainable in the order of the forward pass."""
        return [*self.trainables.named_tensors(), *self.task.named_tensors()]

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy values into the trainables; UserError unless names and shapes are those of `named_tensors`."""
        of_task = {name: tensors[name] for name, _ in self.task.named_tensors() if name in tensors}
        self.task.load_tensors(of_task)
        self.trainables.load_tensors({name: tensor for name, tensor in tensors.items() if name not in of_task})


def start_fresh(parts: Assembled, spec: TrainableSpec[Any], source: TensorSource) -> None:
    """Let the trainables of a new run take starting values from the base's weights, which `source` reads.

    On rank 0 alone: the others' trainables are made equal to its own before they are used.
    """
    if dist.get_rank() == 0:
        spec.start_from_base(parts.trainables, parts.base, source)


def make_forward(
    config: RunConfig, parts: Assembled, spec: TrainableSpec[Any], data: TokenDataset, device: torch.device
) -> Forward:
    """The forward pass of training: through the base, or as the spec has it."""
    keep_head = partial(parts.engine.keep_gathered, parts.base.units.tables[-1])
    return spec.forward(TrainingParts(parts.base, parts.trainables, data, Path(config.output_dir), device, keep_head))


def assemble(
    config: RunConfig,
    skeleton: BaseModel,
    spec: TrainableSpec[Any],
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
    return attach_trainables(config, skeleton, engine, spec, device)


def attach_trainables(
    config: RunConfig, base: BaseModel, engine: Engine, spec: TrainableSpec[Any], device: torch.device
) -> Assembled:
    """Build the trainables and hook them onto a loaded base that has none."""
    base.head.loss_megabytes = config.train.loss_chunk_megabytes or CHUNK_MEGABYTES[device.type]
    trainables = spec.build(config.train.seed).to(device)
    trainables.attach(base.model)
    return Assembled(base, engine, trainables, make_task(config.task, base, trainables, device))


def make_task(config: TaskConfig, base: BaseModel, trainables: TrainableSet, device: torch.device) -> Task:
    """The task of a run on a base with its trainables."""
    if config.predicts_labels:
        width, regression = base.embedding.embedding_dim, config.name == "regression"
        return Labelling(head_outputs(config), width, regression=regression).to(device)
    if config.prefers:
        reference = reference_beside(base, trainables) if config.has_reference else None
        return PREFERENCES[config.name](config, base, reference)
    return CausalLM(base)


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
    settle_on(skeleton, device)
    load_base(skeleton, source, engine, device, poll)
    skeleton.load_peak_bytes = resident_peak()


def settle_on(base: BaseModel, device: torch.device) -> None:
    """Move what is no parameter, and so no engine's, to the device; let the library's norms use a GPU's kernels."""
    if device.type == "cuda":
        fuse_norms(base.decoder)
    for module in base.model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
