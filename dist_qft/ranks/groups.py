"""Process groups beside the default one, and the way out of them."""

import sys
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist


def new_group(device: torch.device, timeout_seconds: float, ranks: Sequence[int] | None = None) -> dist.ProcessGroup:
    """A group of `ranks` (None: all) for tensors on `device` alone. Collective over all ranks, members or not.

    Without a timeout torch would give it 30 minutes, and not the timeout of the default group; without a backend it
    would open both gloo's connections and NCCL's.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    members = None if ranks is None else list(ranks)
    return dist.new_group(members, backend=backend, timeout=timedelta(seconds=timeout_seconds))


def leave_group(device: torch.device, group: dist.ProcessGroup | None = None) -> None:
    """Destroy a group (None: the default one and all others), unless NCCL would make this rank wait for the others.

    NCCL's destruction is collective, and waits for the operations that its streams still hold. After an error that
    this rank alone has met the others do not come, so the group is left to the end of the process. gloo's destruction
    returns at once, and a Python that ends with gloo's groups alive often ends by SIGABRT.
    """
    error = sys.exception()
    alone = error is not None and not getattr(error, "everywhere", False)
    if alone and device.type == "cuda" and dist.get_world_size() > 1:
        return
    dist.destroy_process_group(group)
