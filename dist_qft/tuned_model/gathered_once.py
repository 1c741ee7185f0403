"""A sharded base gathered once for many forward passes, where all of it fits: each token of an answer is one."""

import math
from contextlib import AbstractContextManager, nullcontext

import psutil
import torch
import torch.distributed as dist

from dist_qft.base_model.skeleton import BaseModel
from dist_qft.ranks.collectives import maximum
from dist_qft.sharding.engine import Engine, parameter_owners

_SHARE = 0.7  # of the memory that is free; the rest is for activations and the cache of keys and values


def gathered_once(base: BaseModel, engine: Engine, device: torch.device) -> AbstractContextManager[None]:
    """Inside, each rank keeps what it gathers, if every rank has room for the whole base beside its part. Collective.

    What an engine gathers must not change inside.
    """
    fits = whole_bytes(base, engine) - engine.resident_bytes() <= _SHARE * free_bytes(device)
    return nullcontext() if maximum(float(not fits), device) else engine.gathered_once()


def whole_bytes(base: BaseModel, engine: Engine) -> int:
    """Bytes of the base's parameters on all ranks of a group together."""
    parameters = [getattr(module, name) for module, name in parameter_owners(base.units)]
    return sum(math.prod(engine.shape(parameter)) * parameter.itemsize for parameter in parameters)


def free_bytes(device: torch.device) -> int:
    """Bytes that this rank may still take: of its GPU, or its part of the host's if all ranks are on it."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return psutil.virtual_memory().available // dist.get_world_size()
