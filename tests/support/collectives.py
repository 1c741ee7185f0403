"""A record of the collectives that a rank takes part in: (group, operation, bytes), in the order of the calls."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_qft.ranks.collectives import gather_in_place
from dist_qft.training.flat_parameters import FlatParameters


class Recorder(TorchDispatchMode):
    """Sees each collective where it enters c10d, whichever package calls it, on whatever torch.distributed function."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[str, str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            leaves = tree_leaves((args, kwargs))
            groups = [leaf for leaf in leaves if isinstance(leaf, torch.ScriptObject) and "Group" in str(leaf._type())]
            group = dist.ProcessGroup.unbox(groups[0]).group_name if groups else ""
            tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            name = func._schema.name.removeprefix("c10d::").strip("_")
            self.log.append((group, name, max((tensor.nbytes for tensor in tensors), default=0)))
        return func(*args, **(kwargs or {}))


@contextmanager
def recorded_collectives() -> Iterator[list[tuple[str, str, int]]]:
    """Context whose list gets an entry for each collective of this thread, with the bytes of its largest tensor."""
    with Recorder() as recorder:
        yield recorder.log


def gather_gradients(trainables: FlatParameters) -> None:
    """Put every rank's slices of the summed gradient into `values.grad`, where the optimizer is spread over ranks."""
    if trainables.shard:
        buckets = [trainables._reduced[slice(*bucket)] for bucket in trainables.slices.buckets]
        gather_in_place(buckets, trainables._own_gradients, None)
