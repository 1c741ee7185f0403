"""How the ranks meet: torch.distributed's default process group, and the store through which they find each other."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from dist_qft.errors import SetupError
from dist_qft.ranks import mpi
from dist_qft.ranks.activity import Activity
from dist_qft.ranks.peers import Peers
from dist_qft.ranks.world import World


@contextmanager
def connect(
    world: World, device: torch.device, timeout_seconds: float, doing: Callable[[], str] | None = None
) -> Iterator[Peers]:
    """Join the ranks into torch.distributed's default process group, also for a world of one. Collective.

    gloo serves CPU tensors and NCCL those on GPUs.

    Args:
        timeout_seconds: bounds the meeting and every later collective.
        doing: returns this rank's present activity, for messages about a lost peer.

    Raises:
        SetupError: the ranks did not meet.
    """
    _join(world, device, timeout_seconds)
    try:
        peers = Peers(doing or Activity())
        try:
            yield peers
        finally:
            peers.close()
    finally:
        # After an error too: where a peer is gone, a Python that ends with the group alive often ends by SIGABRT.
        dist.destroy_process_group()
    mpi.finalize()


def _join(world: World, device: torch.device, timeout_seconds: float) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world.single_node and "lo" in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nobody outside this machine has a part in it
    timeout = timedelta(seconds=timeout_seconds)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        store = _store(world, timeout)
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.world_size, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise SetupError(
            f"rank {world.rank} of {world.world_size} could not meet the others at"
            f" {world.master_address}:{world.master_port} within {timeout_seconds:g} s: {reason}"
        ) from error


def _store(world: World, timeout: timedelta) -> dist.Store:
    """The key-value store through which the ranks find each other."""
    if world.launcher == "torchrun":
        return next(dist.rendezvous("env://", timeout=timeout))[0]  # knows whether the agent already serves a store
    if world.world_size == 1:
        return dist.HashStore()
    address, port = world.master_address, world.master_port
    return dist.TCPStore(address, port, world.world_size, is_master=world.rank == 0, timeout=timeout)
