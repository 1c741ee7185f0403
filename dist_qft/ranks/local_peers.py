"""The processes of the other ranks on this machine, and which of them have ended.

For the message about a lost peer: not every launcher says which rank was killed, and a broken connection does not say
which rank was at its other end.
"""

import os
import socket
import time
import zlib

import psutil
import torch
import torch.distributed as dist

_GRACE_SECONDS = 0.5  # a killed process closes its connections a little before it counts as ended


class LocalPeers:
    """The other ranks on this machine. Construction is collective."""

    def __init__(self) -> None:
        own = torch.tensor([zlib.crc32(socket.gethostname().encode()), os.getpid()])
        everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, own)
        self._processes: dict[int, psutil.Process] = {}
        for rank, (host, pid) in enumerate(torch.stack(everyone).tolist()):
            if host == own[0] and pid != os.getpid() and psutil.pid_exists(pid):
                self._processes[rank] = psutil.Process(pid)

    def ended(self) -> list[int]:
        """The ranks that no longer run, in order; empty if none has ended within a moment."""
        deadline = time.monotonic() + _GRACE_SECONDS
        while True:
            ended = [rank for rank, process in self._processes.items() if not _runs(process)]
            if ended or time.monotonic() > deadline:
                return ended
            time.sleep(0.01)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
