"""The door to the engines: a name and its settings to an `Engine`; a package is imported only for its own engine."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from dist_qft.errors import UserError
from dist_qft.ranks.collectives import everywhere
from dist_qft.sharding.engine import Engine


def make_engine(
    name: str,
    *,
    reshard_after_forward: bool = True,
    prefetch_bytes: int = 0,
    offload: bool = False,
    zero_options: Mapping[str, Any] | None = None,
) -> Engine:
    """The engine called `name`, with the settings that are its own; its package is imported only here."""
    if name == "fsdp":
        from dist_qft.sharding.fsdp import FsdpEngine

        return FsdpEngine(reshard_after_forward=reshard_after_forward)
    if name == "replicated":
        from dist_qft.sharding.replicated import ReplicatedEngine

        return ReplicatedEngine()
    if name == "zero":
        if find_spec("deepspeed") is None:
            remedy = "pip install 'dist-qft[deepspeed]'"
            raise everywhere(UserError(f"sharding.engine: zero needs DeepSpeed, which is not installed; {remedy}"))
        from dist_qft.sharding.zero import ZeroEngine

        return ZeroEngine(prefetch_bytes=prefetch_bytes, offload=offload, options=zero_options)
    raise UserError(f"sharding.engine: got '{name}', need 'fsdp', 'zero' or 'replicated'")
