"""The memory of a rank at its peak, by part, and the smallest shard group and the cheapest change that would fit.

Base, trainables, gradients, moments, casts and what the reduction holds are exact. What is gathered, activations and
workspace are estimates from the layers' shapes: they count the results that backward passes need, and no kernel's own
buffers. `docs/scaling.md` has them beside the live bytes of the real step and beside measured peaks.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import psutil
import torch

from dist_qft.base_model.skeleton import BaseModel
from dist_qft.config.check import accumulation_steps, cross_field_faults
from dist_qft.config.schema import RunConfig
from dist_qft.divisors import divisors
from dist_qft.ranks.device import planned_device
from dist_qft.ranks.world import World
from dist_qft.sharding.engine import Engine, parameter_owners
from dist_qft.sharding.engines import engine_of
from dist_qft.sharding.shard_group import ranks_in_group
from dist_qft.training.links import Placement
from dist_qft.training.model_sizes import ModelSizes
from dist_qft.training.planned_activations import (
    asked_for,
    head_workspace,
    kept_activations,
    score_workspace,
    tokens_per_micro_batch,
)
from dist_qft.training.planned_reduction import PlannedReduction
from dist_qft.tuned_model.task import head_outputs

_RUNTIME = {"cuda": 1 << 30, "cpu": 430 << 20}  # CUDA's context, cuBLAS and NCCL; Python with its packages
_STEPPING = 25 << 20  # on CPUs, from the first step: TensorBoard, the packages of optimizers, BLAS's buffers
_DEEPSPEED = 30 << 20  # on CPUs, with its packages
_LOADING = 16 << 20  # the rows in hand of a weight that is read and quantized
# The holes that glibc before 2.38 keeps and does not use again, over the activations of all layers: also of those that
# compute them again, which ask for the same blocks one after the other.
_HOLES = 0.6

Change = dict[str, Any]  # `section.key` -> value


class MemoryPlan:
    """The memory of a run's ranks, for its config or a changed one.

    Args:
        trainable: parameters, with those of the task's own head.
        through_base: gradients flow back through the base, so that its activations are kept.
    """

    def __init__(self, base: BaseModel, trainable: int, through_base: bool) -> None:
        self._tensors = [getattr(module, name) for module, name in parameter_owners(base.units)]
        self._trainable, self._through_base = trainable, through_base
        self.sizes = ModelSizes.of(base)

    def parts(self, config: RunConfig, world_size: int, group: int) -> dict[str, int]:
        """Bytes of each part on the fullest rank."""
        engine, device = engine_of(config), planned_device(config.sharding.device).type
        reduction = PlannedReduction(config, self._trainable, world_size, accumulation_steps(config, world_size))
        fullest = self._fullest(config, engine, reduction)
        in_host_memory = device == "cuda" and engine.name == "zero" and config.sharding.offload
        in_16_bits = device == "cuda" and self._through_base and self.sizes.itemsize == 2
        return {
            "base": 0 if in_host_memory else sum(engine.part_bytes(tensor, group) for tensor in self._tensors),
            "gathered": fullest["gathered"],
            "trainables": reduction.buffer_bytes,
            "gradients": reduction.buffer_bytes + reduction.header_bytes,
            "moments": reduction.optimizer_bytes,
            "casts": 2 * self._trainable if in_16_bits else 0,  # of adapters, once per step (`AdapterSet.cast_once`)
            "reduction": fullest["reduction"],
            "activations": fullest["activations"],
            "workspace": fullest["workspace"],
            "allocator": int(_HOLES * asked_for(config, self.sizes)) if device == "cpu" and _leaves_holes() else 0,
            "runtime": _RUNTIME[device] + (_in_steps(engine) if device == "cpu" else 0),
        }

    def load_peak(self, parts: Mapping[str, int], device: str) -> int:
        """Bytes on the fullest rank while the base is read: its part, the rows in hand, and one weight's constants.

        Rows are quantized on the CPU and only then go to a GPU, which holds nothing else of the run yet.
        """
        held = parts["base"] + _RUNTIME[device]
        return held + (_LOADING + 4 * self.sizes.largest // 64 if device == "cpu" else 0)

    def peak(self, config: RunConfig, world_size: int, group: int) -> int:
        return sum(self.parts(config, world_size, group).values())

    def _fullest(self, config: RunConfig, engine: Engine, reduction: PlannedReduction) -> dict[str, int]:
        """Bytes gathered, kept, worked with and held by the reduction at the fullest time of a step.

        A unit is there twice when it has just been gathered: as it came, and in its parameters. In a layer's backward
        pass fsdp has the next one as it came; zero has what it may gather ahead.
        """
        sizes, kept = self.sizes, kept_activations(config, self.sizes)
        logits = 0 if head_outputs(config.task) else head_workspace(config, sizes)
        tokens = tokens_per_micro_batch(config)
        # A matrix's weights or a sum, beside the gradients of its inputs, from base and adapter, and of its result.
        gradients = tokens * (2 * sizes.inner + sizes.hidden)
        product = (gradients + max(sizes.largest, tokens * sizes.inner)) * sizes.itemsize
        product = max(product, score_workspace(config, sizes))
        table, layers, whole = sizes.table_bytes, 2 * sizes.layer_bytes, 0
        if engine.name == "replicated":
            table = layers = 0
        elif engine.name == "zero":
            layers = sizes.layer_bytes + int(config.sharding.prefetch_megabytes * 2**20)
        elif not config.sharding.reshard_after_forward:
            layers, whole = 0, sizes.packed
        held, device = reduction.held_bytes, planned_device(config.sharding.device).type
        times = (
            (whole + 2 * table, kept.at_head, 0, held),
            (whole + table, kept.at_head, logits, held),
            (whole + layers, kept.in_layer, product, held + reduction.received_bytes(device)),
            (whole, 0, 0, reduction.exchange_bytes),
        )
        return dict(zip(("gathered", "activations", "workspace", "reduction"), max(times, key=sum), strict=True))

    def smallest_group(self, config: RunConfig, place: Placement, limit: int) -> int:
        """The fewest ranks per shard group whose plan is within `limit` bytes; all ranks if none is.

        Groups within a node come first, then whole nodes.
        """
        for size in _group_sizes(place):
            if self.peak(config, place.world_size, size) <= limit:
                return size
        return place.world_size

    def remedy(self, config: RunConfig, place: Placement, limit: int) -> str | None:
        """The cheapest change of settings with which the plan is within `limit` bytes; None if no one is known."""

        def helps(change: Change) -> bool:
            changed, group = _with(config, change), change.get("sharding.group", place.group_size)
            return _is_accepted(config, change) and self.peak(changed, place.world_size, group) <= limit

        for change in _exchanges(config, place):
            if helps(change):
                return _words(change)
        savings: list[Change] = []
        for saving in self._savings(config, place):
            if not _is_accepted(config, _together([*savings, saving])):
                continue
            savings.append(saving)
            if helps(_together(savings)):
                break
        else:
            return None
        for costly in savings[-2::-1]:  # without those that turn out not to be needed
            rest = [each for each in savings if each is not costly]
            savings = rest if helps(_together(rest)) else savings
        return _words(_together(savings))

    def _savings(self, config: RunConfig, place: Placement) -> Iterator[Change]:
        """Changes to be made one after the other, in the order of their cost in time."""
        world, train, sharding = place.world_size, config.train, config.sharding
        on_gpu = planned_device(sharding.device).type == "cuda"
        if sharding.engine == "fsdp" and not sharding.reshard_after_forward:
            yield {"sharding.reshard_after_forward": True}
        if sharding.engine == "zero" and sharding.prefetch_megabytes:
            yield {"sharding.prefetch_megabytes": 0}
        if self._through_base and not train.gradient_checkpointing:
            yield {"train.gradient_checkpointing": True}
        if self._through_base and train.checkpoint_every_n_layers > 1:
            yield {"train.checkpoint_every_n_layers": 1}
        for size in divisors(train.per_device_train_batch_size)[:-1]:
            if _is_accepted(config, {"train.per_device_train_batch_size": size}):
                yield {"train.per_device_train_batch_size": size}  # tasks of pairs have a smallest one
                break
        spread: Change = {"train.shard_optimizer": True} if world > 1 and train.shard_optimizer is not True else {}
        if world > 1 and sharding.engine == "replicated":
            spread |= {"sharding.engine": "fsdp", "sharding.group": world}
        elif place.group_size < world:
            spread |= {"sharding.group": world}
        if spread:
            yield spread
        if on_gpu and sharding.engine == "zero" and not sharding.offload:
            yield {"sharding.offload": True}
        if on_gpu and self._through_base and not train.offload_activations:
            yield {"train.offload_activations": True}
        if on_gpu and train.optim != "paged_adamw_8bit":
            yield {"train.optim": "paged_adamw_8bit"}


def _exchanges(config: RunConfig, place: Placement) -> Iterator[Change]:
    """Single changes that cost traffic between ranks alone, which grows from one to the next."""
    if place.world_size > 1 and config.train.shard_optimizer is not True:
        yield {"train.shard_optimizer": True}
    for size in _group_sizes(place):
        if config.sharding.engine == "replicated" and place.world_size > 1:
            yield {"sharding.engine": "fsdp", "sharding.group": size}
        elif size > place.group_size:
            yield {"sharding.group": size}


def chosen_group(config: RunConfig, memory: MemoryPlan, place: Placement, limit: int | None) -> int:
    """The ranks that share a base under `sharding.group`; `limit`, bytes of a rank, counts for `auto` alone."""
    setting, world = config.sharding.group, place.world_size
    if setting != "auto":
        return ranks_in_group(setting, world, place.ranks_per_node)
    return memory.smallest_group(config, place, limit) if limit is not None else world


def automatic_group(config: RunConfig, memory: MemoryPlan, world: World, device: torch.device) -> tuple[int, str]:
    """The group that `sharding.group: auto` takes on this machine, and a line to tell the user."""
    limit = detected_memory(device, world.local_world_size)
    assert limit is not None, "a rank on CUDA has a GPU"
    place = Placement(world.world_size, world.local_world_size, world.world_size)
    size = chosen_group(config, memory, place, limit)
    peak = memory.peak(config, world.world_size, size)
    fits = "the fewest whose plan fits" if peak <= limit else "all, and still more than"
    told = f"sharding.group: auto took {size} of {world.world_size} ranks, {fits} {limit / 2**30:.1f} GiB"
    return size, f"{told} (planned: {peak / 2**30:.1f} GiB)"


def detected_memory(device: torch.device, ranks_on_node: int) -> int | None:
    """Bytes that one rank may use here: its GPU's, or its share of the machine's. None for GPUs of another machine."""
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return None
        return torch.cuda.mem_get_info(device)[1]
    return psutil.virtual_memory().total // ranks_on_node


def _in_steps(engine: Engine) -> int:
    """Bytes of packages that the steps of a run need, and its loading does not."""
    return _STEPPING + (_DEEPSPEED if engine.name == "zero" else 0)


def _leaves_holes() -> bool:
    """True with a glibc that does not use an aligned hole again (its bug 14581; `sharding.host_memory`)."""
    try:
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
    except (OSError, ValueError):  # not glibc
        return False
    return name == "glibc" and tuple(map(int, version.split(".")[:2])) < (2, 38)


def _group_sizes(place: Placement) -> list[int]:
    world, per_node = place.world_size, place.ranks_per_node
    inside = [size for size in range(1, per_node + 1) if per_node % size == 0]
    return inside + [size for size in range(2 * per_node, world + 1, per_node) if world % size == 0]


def _with(config: RunConfig, change: Change) -> RunConfig:
    for key, value in change.items():
        section, name = key.split(".")
        config = config.model_copy(update={section: getattr(config, section).model_copy(update={name: value})})
    return config


def _is_accepted(config: RunConfig, change: Change) -> bool:
    """True if a change makes no setting contradict another."""
    before = [str(fault) for fault in cross_field_faults(config)]
    return all(str(fault) in before for fault in cross_field_faults(_with(config, change)))


def _together(changes: Sequence[Change]) -> Change:
    return {key: value for change in changes for key, value in change.items()}


def _words(change: Change) -> str:
    """A change as overrides on the command line."""
    return " ".join(f"{key}={str(value).lower()}" for key, value in change.items())
