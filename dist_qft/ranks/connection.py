"""The meeting of the ranks: torch.distributed's default process group, and the store through which they meet."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Timer

import torch
import torch.distributed as dist

from dist_qft.errors import DistQFTError, SetupError
from dist_qft.ranks import mpi
from dist_qft.ranks.activity import Activity
from dist_qft.ranks.device import let_products_repeat, let_segments_grow
from dist_qft.ranks.groups import leave_group
from dist_qft.ranks.launchers import LAUNCHER
from dist_qft.ranks.network import (
    LOOPBACK,
    choose_interface,
    client_store,
    listening_address,
    listening_store,
    require_interfaces,
)
from dist_qft.ranks.peers import Peers
from dist_qft.ranks.process import imported
from dist_qft.ranks.world import World

_COME = "dist_qft/come"
_POLL_SECONDS = 0.1
_PATIENCE_SECONDS = 60.0  # loading Python and PyTorch from a slow file system takes so long
_INTERACTIVE_PATIENCE_SECONDS = 5.0
_INTERACTIVE_JOBS = ("bash", "fish", "interactive", "sh", "tcsh", "zsh")  # names of Slurm jobs around a shell


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
    imported()
    _join(world, device, timedelta(seconds=timeout_seconds))
    try:
        peers = Peers(doing or Activity(), device, timeout_seconds)
        in_order = False
        try:
            yield peers
            in_order = True
        except DistQFTError as error:
            in_order = error.everywhere
            raise
        finally:
            peers.close(in_order=in_order)
    finally:
        leave_group(device)
    mpi.finalize()


def _join(world: World, device: torch.device, timeout: timedelta) -> None:
    require_interfaces(nccl=device.type == "cuda")
    choose_interface(world.single_node, world.master_address)
    backend, own = "gloo", None
    if device.type == "cuda":
        let_segments_grow()
        let_products_repeat()
        # cuDNN's attention plans anew for each length of a row, on the host; flash attention does not.
        os.environ.setdefault("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")
        torch.cuda.set_device(device)
        # The operations of two groups run in the order in which the host launched them, and not in any: a reduction
        # and a gather cannot wait for each other. NCCL reads it when its first group is made.
        os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
        # With the device, NCCL connects now, and later groups are split off this one instead of connecting anew.
        backend, own = "cpu:gloo,cuda:nccl", device
    try:
        store = _meet(world, timeout)
        dist.init_process_group(
            backend, store=store, rank=world.rank, world_size=world.world_size, timeout=timeout, device_id=own
        )
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise SetupError(
            f"rank {world.rank} of {world.world_size} could not meet the others at"
            f" {world.master_address}:{world.master_port} within {timeout.total_seconds():g} s: {reason}"
        ) from error


def _meet(world: World, timeout: timedelta) -> dist.Store:
    """The key-value store through which the ranks find each other, once all of them have come to it.

    Raises:
        TimeoutError, RuntimeError, OSError: they did not all come in time, or the port is somebody else's.
    """
    if world.world_size == 1:
        return dist.HashStore()
    deadline = time.monotonic() + timeout.total_seconds()
    come = 0
    announcement = Timer(_patience(), lambda: _announce_wait(world, come))
    announcement.daemon = True
    announcement.start()
    try:
        store = _store(world, timeout)
        come = store.add(_COME, 1)
        while come < world.world_size:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{come} of {world.world_size} ranks came")
            time.sleep(_POLL_SECONDS)
            come = store.add(_COME, 0)
        return store
    finally:
        announcement.cancel()


def _store(world: World, timeout: timedelta) -> dist.Store:
    address, port = world.master_address, world.master_port
    if world.launcher == "torchrun" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun's agent on the first node serves it, and unlike our launcher's the same one at each restart.
        attempt = "" if LAUNCHER in os.environ else os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
        return dist.PrefixStore(f"attempt{attempt}", client_store(address, port, timeout))
    if world.rank == 0:
        return listening_store(listening_address(world.single_node, address), port, timeout)
    return client_store(LOOPBACK if world.single_node else address, port, timeout)


def _patience() -> float:
    """Seconds of waiting before a rank reports the missing ones: few where somebody sits at a terminal."""
    job = os.path.basename(os.environ.get("SLURM_JOB_NAME", ""))
    interactive = sys.stdin is not None and sys.stdin.isatty()
    return _INTERACTIVE_PATIENCE_SECONDS if interactive or job in _INTERACTIVE_JOBS else _PATIENCE_SECONDS


def _announce_wait(world: World, come: int) -> None:
    """Report the missing ranks, and how to run without them. Rank 0 speaks, and on other nodes local rank 0."""
    place = f"{world.master_address}:{world.master_port}"
    if world.rank == 0:
        missing = world.world_size - come
        text = f"waiting for {missing} more of {world.world_size} ranks at {place}, as {world.launcher} has it"
    elif world.local_rank == 0:
        text = f"rank {world.rank} of {world.world_size} waits for the others at {place}, as {world.launcher} has it"
    else:
        return
    if world.launcher == "slurm":
        text += "; to run alone: srun --overlap --ntasks=1 COMMAND, or env -u SLURM_STEP_ID COMMAND"
    elif world.launcher == "environment":
        text += "; to run alone: env -u RANK -u WORLD_SIZE -u LOCAL_RANK COMMAND"
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
