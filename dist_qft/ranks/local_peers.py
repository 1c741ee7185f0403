"""The processes of the other ranks on this machine, and which of them have ended.

For the message about a lost peer: not every launcher says which rank was killed, and a broken connection does not say
which rank was at its other end. That each of them has a GPU of its own is checked here, too.
"""

import contextlib
import hashlib
import os
import socket
import time
import zlib
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from dist_qft.errors import SetupError
from dist_qft.ranks.collectives import everywhere

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_GRACE_SECONDS = 0.5  # a killed process closes its connections a little before it counts as ended


class LocalPeers:
    """The other ranks on this machine. Construction is collective.

    Raises:
        SetupError: on all ranks, if two have the same GPU.
    """

    def __init__(self, device: torch.device) -> None:
        own = torch.tensor([machine_number(), os.getpid(), _gpu_number(device)])
        everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, own)
        places = torch.stack(everyone).tolist()
        require_own_gpus([gpu for _, _, gpu in places])
        self._processes: dict[int, psutil.Process] = {}
        for rank, (host, pid, _) in enumerate(places):
            if host == own[0] and pid != os.getpid() and psutil.pid_exists(pid):
                self._processes[rank] = psutil.Process(pid)

    def ended(self, patience_seconds: float = _GRACE_SECONDS) -> list[int]:
        """The ranks that no longer run, in order; empty if none has ended within `patience_seconds`."""
        deadline = time.monotonic() + patience_seconds
        while True:
            ended = [rank for rank, process in self._processes.items() if not _runs(process)]
            if ended or time.monotonic() > deadline:
                return ended
            time.sleep(0.01)


def machine_number() -> int:
    """A number that processes have in common if their process ids name the same processes.

    Host names repeat: beside them count the boot of the kernel and the container's process namespace.
    """
    boot, namespace = "", 0
    with contextlib.suppress(OSError):  # not Linux
        boot = _BOOT_ID.read_text()
        namespace = os.stat("/proc/self/ns/pid").st_ino
    return zlib.crc32(f"{socket.gethostname()} {boot} {namespace}".encode())


def _gpu_number(device: torch.device) -> int:
    """A number made from the GPU's UUID; 0 for a CPU. Its index says nothing where each rank sees one GPU alone."""
    if device.type != "cuda":
        return 0
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return int.from_bytes(hashlib.sha256(uuid.encode()).digest()[:8], "little", signed=True)


def require_own_gpus(gpus: list[int]) -> None:
    """SetupError if two ranks have the same GPU. `gpus` has a number for each rank's, 0 for a CPU."""
    first: dict[int, int] = {}
    for rank, gpu in enumerate(gpus):
        if gpu and gpu in first:
            words = "have the same GPU: give every rank of a node its own, or start fewer"
            raise everywhere(SetupError(f"ranks {first[gpu]} and {rank} {words}"))
        first[gpu] = rank


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
