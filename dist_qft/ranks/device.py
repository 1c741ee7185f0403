"""The device and the compute dtype of a rank, and those that a plan assumes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from dist_qft.errors import SetupError, UserError
from dist_qft.ranks.collectives import everywhere
from dist_qft.ranks.world import World

CPU_PRECISION = "DIST_QFT_CPU_PRECISION"  # float32 or bfloat16: the meaning of `auto` on CPUs, for clusters of several
_ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is the name of old
_GROWING = "expandable_segments:True"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_BFLOAT16_UNITS = ("amx_bf16", "avx512_bf16")  # as Linux calls them


def compute_dtype(setting: str, device: torch.device) -> torch.dtype:
    """The dtype of activations: `auto` is bfloat16 on CUDA and on CPUs that multiply it natively, else float32.

    Raises:
        SetupError: the environment variable DIST_QFT_CPU_PRECISION is neither of the two.
    """
    if setting != "auto":
        return _DTYPES[setting]
    if device.type == "cuda":
        return torch.bfloat16
    if wanted := os.environ.get(CPU_PRECISION):
        if wanted not in _DTYPES:
            raise SetupError(f"{CPU_PRECISION}: got {wanted}, must be one of {', '.join(_DTYPES)}")
        return _DTYPES[wanted]
    return torch.bfloat16 if bfloat16_units() else torch.float32


@cache
def bfloat16_units(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """The instruction sets of this CPU that multiply bfloat16; none where the system does not say.

    Without them PyTorch emulates the products, at a fraction of float32's speed; with them they are 6 to 9 times faster
    (AMX). The flags decide, not a measurement: ranks on like CPUs must come to one answer.
    """
    try:
        lines = cpuinfo.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return ()
    flags = next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())
    return tuple(name for name in _BFLOAT16_UNITS if name in flags)


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype as configs have it, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def why_dtype(setting: str, device: torch.device) -> str:
    """The reason for a compute dtype in a few words, empty if the config names it."""
    if setting != "auto":
        return ""
    if device.type == "cuda":
        return "auto on CUDA"
    if os.environ.get(CPU_PRECISION):
        return f"auto, {CPU_PRECISION}"
    return f"auto: this CPU has {', '.join(units)}" if (units := bfloat16_units()) else "auto: a CPU without bfloat16"


def let_segments_grow() -> None:
    """Have PyTorch's allocator of GPU memory extend its segments, unless the user has set it otherwise.

    Rows of other lengths at each step leave holes of all sizes; segments that grow have none. The allocator is told as
    well as the environment, which a CUDA build may have read when it was imported.
    """
    if not any(name in os.environ for name in _ALLOCATOR_SETTINGS):
        os.environ[_ALLOCATOR_SETTINGS[0]] = _GROWING
        torch._C._accelerator_setAllocatorSettings(_GROWING)


def let_products_repeat() -> None:
    """Give cuBLAS the work space with which its products can be repeated bit by bit. Before the process's first one."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def compute_reproducibly(device: torch.device, asked: bool = True) -> None:
    """Have a GPU add in one order: attention's backward pass and cuBLAS's products are otherwise free to choose.

    A CPU does so by itself. An operator without such an order raises RuntimeError: see `order_required`.

    Args:
        asked: False lets a GPU choose again, after a run of this process that had asked.
    """
    if device.type == "cuda":
        let_products_repeat()
        # Not `warn_only`: with it flash and memory-efficient attention warn, and add in any order as before.
        torch.use_deterministic_algorithms(asked)
        # Else every new tensor is filled first, one more pass over each dequantized weight.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # set at run time


@contextmanager
def order_required() -> Iterator[None]:
    """Context in which an operator that `compute_reproducibly` cannot have add in one order is a mistake of the config.

    Raises:
        UserError: on all ranks, which run the same operators.
    """
    try:
        yield
    except RuntimeError as error:
        operator, named, _ = str(error).partition(" does not have a deterministic implementation")
        if not named:
            raise
        reason = f"{operator}, which this model needs, adds in any order on a GPU"
        raise everywhere(UserError(f"sharding.gradient_sum: got invariant, must be fast: {reason}")) from error


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
