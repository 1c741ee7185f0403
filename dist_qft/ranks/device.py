"""The device and the compute dtype of a rank, and those that a plan assumes."""

import os
from typing import Literal

import torch

from dist_qft.errors import SetupError
from dist_qft.ranks.world import World


def compute_dtype(setting: str, device: torch.device) -> torch.dtype:
    """The dtype of activations: `auto` is bfloat16 on CUDA and float32 on CPUs (most have no bf16 units)."""
    if setting == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[setting]


def compute_reproducibly(device: torch.device) -> None:
    """Have a GPU add in one order: attention's backward pass and cuBLAS's products are otherwise free to choose.

    Before the first product. A CPU does so by itself.
    """
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def device_for(world: World, setting: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device of this rank: its own GPU (index `local_rank`), or the CPU.

    Where only one GPU is visible it is taken for this rank's own, as batch systems and Kubernetes bind them; that no
    two ranks have the same one is checked when they connect.

    Raises:
        SetupError: "cuda" without a GPU, or more ranks on this node than the several GPUs that are visible.
    """
    gpus = 0 if setting == "cpu" else torch.cuda.device_count()
    if gpus == 0 and setting == "cuda":
        raise SetupError("sharding.device: cuda was asked for, but PyTorch finds no CUDA device here; use auto or cpu")
    if gpus == 0:
        return torch.device("cpu")
    if gpus == 1:
        return torch.device("cuda", 0)
    if world.local_rank >= gpus:
        raise SetupError(
            f"rank {world.rank} is number {world.local_rank + 1} of {world.local_world_size} ranks on this node, which"
            f" sees {gpus} GPUs: start one rank per GPU, and let every rank see all of them or its own alone"
        )
    return torch.device("cuda", world.local_rank)


def planned_device(setting: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device the run would use; unlike the run's own choice, a plan for GPUs needs none."""
    if setting == "auto":
        setting = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(setting)
