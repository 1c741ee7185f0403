"""DeepSpeed's start on a device and a process group that are there, and what it takes from the environment."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def start_deepspeed(device: torch.device) -> None:
    """Import DeepSpeed for `device` and put it onto the process group that exists."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # not every launcher sets it
    import deepspeed

    # Serves inference_all_reduce alone, and would be compiled with g++ and ninja at every first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # torch 2.13 renames the collective that DeepSpeed calls.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor", category=FutureWarning)
    deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False)


@contextmanager
def gpu_as_local_rank(device: torch.device) -> Iterator[None]:
    """Context in which LOCAL_RANK is the number of this rank's GPU, for which DeepSpeed takes it.

    Where each rank of a node sees its own GPU alone, that number is 0 on all of them.
    """
    local_rank = os.environ["LOCAL_RANK"]
    if device.index is not None:
        os.environ["LOCAL_RANK"] = str(device.index)
    try:
        yield
    finally:
        os.environ["LOCAL_RANK"] = local_rank
