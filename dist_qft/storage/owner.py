"""The process to which something on a shared disk belongs, and whether it still runs.

A process is named by its machine, the machine's boot, its process id and its start time, so that neither a reused
process id nor a reboot makes a dead owner look alive. Nobody can look into another machine: there the answer is None.
"""

import hashlib
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

_TOKEN = re.compile(r"([0-9a-f]{8})([0-9a-f]{8})-(\d+)-(\d+)")
_MACHINE_ID = re.compile("[0-9a-f]{32}")
_HOSTS_NAMESPACE = 0xEFFFFFFC  # Linux's inode of the first process namespace, that of no container


@dataclass(frozen=True)
class Owner:
    """One process.

    Attributes:
        machine: see `machine_hash`; containers of one host count as other machines.
        boot: hash of the kernel's boot id.
        started: start time of the process, in the kernel's clock ticks since boot.
    """

    machine: str
    boot: str
    pid: int
    started: int

    @classmethod
    def current(cls) -> "Owner":
        """The calling process."""
        return cls(_machine(), _boot(), os.getpid(), _start_time(os.getpid()) or 0)

    @classmethod
    def parse(cls, token: str) -> "Owner | None":
        """The owner that `str(owner)` names; None for any other text."""
        match = _TOKEN.fullmatch(token)
        return cls(match[1], match[2], int(match[3]), int(match[4])) if match else None

    def __str__(self) -> str:
        """A token of letters, digits and dashes, fit for a file name."""
        return f"{self.machine}{self.boot}-{self.pid}-{self.started}"

    def is_alive(self) -> bool | None:
        """True if the process runs (or is stopped), False if it has ended, None if it belongs to another machine."""
        if self.machine != _machine():
            return None
        return self.boot == _boot() and _start_time(self.pid) == self.started


def _start_time(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot; None if it has ended."""
    try:
        # After the command's name, which may itself hold spaces and parentheses: state is field 1, start field 20.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    except (OSError, IndexError, ValueError):
        return None
    try:  # no /proc: macOS
        return int(psutil.Process(pid).create_time() * 100)
    except psutil.Error:
        return None


@cache
def _machine() -> str:
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = None
    ports = sorted(Path("/sys/class/net").glob("*/device"))
    addresses = [_text(port.with_name("address")) for port in ports]
    return machine_hash(socket.gethostname(), namespace, _text(Path("/etc/machine-id")), addresses, _boot())


def machine_hash(host: str, namespace: int | None, machine_id: str, addresses: Sequence[str], boot: str) -> str:
    """The name of a machine, which stays after a reboot only where it is certain that no other machine has it.

    Host names repeat, and so do the ids of cloned machines; on one network their ports' addresses do not. Containers
    have the id of their image, or none, and numbers of namespaces that repeat from host to host: their name lasts until
    their host's next boot. A name that nobody knows is that of another machine, whose processes are watched.

    Args:
        namespace: inode of the process namespace; None where there are none.
        machine_id: content of /etc/machine-id; "" if there is none.
        addresses: hardware addresses of the network ports.
        boot: hash of the kernel's boot id.
    """
    lasts = namespace == _HOSTS_NAMESPACE and _MACHINE_ID.fullmatch(machine_id.strip())
    identity = [machine_id, *addresses] if lasts else [boot]
    return _short_hash(" ".join([host, str(namespace), *identity]))


@cache
def _boot() -> str:
    return _short_hash(_text(Path("/proc/sys/kernel/random/boot_id")))


def _text(path: Path) -> str:
    """A file's content; "" if it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
