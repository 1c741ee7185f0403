"""The choice of the ranks' network interface, and stores that listen on that interface alone.

Ranks of one machine use the loopback interface, which nobody outside can reach. On several nodes it is the interface by
which the nodes reach MASTER_ADDR: gloo's own choice, the address that the host's name resolves to, is often 127.0.1.1
or a management network. GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME override both choices.
"""

import ipaddress
import os
import socket
import time
from collections.abc import Mapping, MutableMapping
from datetime import timedelta

import psutil
import torch.distributed as dist

from dist_qft.errors import SetupError
from dist_qft.ranks.patience import NoAnswerError, answer_within

LOOPBACK = "127.0.0.1"

_ANY_ADDRESS = ""
_OUTSIDE = "198.51.100.1"  # reserved for documentation: no such machine, so its route is the default route
_RETRY_SECONDS = 0.2


def choose_interface(single_node: bool, master_address: str, env: MutableMapping[str, str] = os.environ) -> None:
    """Set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, where the user has not; must come before the groups are made."""
    name = interface_of(LOOPBACK if single_node else own_address(master_address, env))
    if name is not None:
        env.setdefault("GLOO_SOCKET_IFNAME", name)
        env.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # "=": this one, and not each that begins so


def require_interfaces(nccl: bool, env: Mapping[str, str] = os.environ) -> None:
    """Refuse a variable that names no interface of this machine; gloo and NCCL do not say which variable it was.

    Args:
        nccl: look at NCCL_SOCKET_IFNAME as well.

    Raises:
        SetupError: gloo's variable names an interface that is not here, or NCCL's fits none.
    """
    here = list(psutil.net_if_addrs())
    for name in filter(None, env.get("GLOO_SOCKET_IFNAME", "").split(",")):
        if name not in here:
            raise SetupError(f"GLOO_SOCKET_IFNAME: got {name}, must be one of {', '.join(here)}")
    wanted = env.get("NCCL_SOCKET_IFNAME", "")
    if nccl and not any(_fits_nccl(wanted, name) for name in here):
        raise SetupError(f"NCCL_SOCKET_IFNAME: got {wanted}, must fit one of {', '.join(here)}")


def own_address(master_address: str, env: Mapping[str, str] = os.environ) -> str:
    """This machine's address on the network by which the nodes of a run reach `master_address`."""
    named = _address_of(env.get("GLOO_SOCKET_IFNAME", ""))
    if named is not None:
        return named
    address = _source_address(master_address)
    if address is not None and (not _is_loopback(address) or _names_loopback(master_address)):
        return address
    # This machine is the master, and its name leads to itself, as in Debian's /etc/hosts.
    outward = _source_address(_OUTSIDE)
    return outward or next(iter(_outer_addresses()), LOOPBACK)


def listening_address(single_node: bool, master_address: str, env: Mapping[str, str] = os.environ) -> str:
    """The address on which the master listens; "" is all of them.

    All are needed if the master's own name leads to a loopback address and the machine has several networks: nothing
    says then by which of them the other nodes will come.
    """
    if single_node:
        return LOOPBACK
    source = _source_address(master_address)
    knows_itself = source is not None and not _is_loopback(source)
    chosen = env.get("GLOO_SOCKET_IFNAME") or knows_itself or _names_loopback(master_address)
    return own_address(master_address, env) if chosen or len(_outer_addresses()) < 2 else _ANY_ADDRESS


def interface_of(address: str) -> str | None:
    """The name of the interface with this address, such as "eth0"; None if this machine has no such address."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in addresses):
            return name
    return None


def listening_store(address: str, port: int, timeout: timedelta) -> dist.TCPStore:
    """A store served by this process on one address ("": all of them); port 0 is any free one.

    Raises:
        OSError: the address is not this machine's, or the port is in use.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(socket.SOMAXCONN)
        port = listener.getsockname()[1]
        return dist.TCPStore(
            address or LOOPBACK,
            port,
            is_master=True,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=os.dup(listener.fileno()),
        )


def reaching_address(master_address: str, env: Mapping[str, str] = os.environ) -> str:
    """The name or address by which this machine reaches a master that listens at its `listening_address`.

    On the master itself, its name may lead to a loopback address, on which the master does not listen.
    """
    source = _source_address(master_address)
    if source is not None and _is_loopback(source) and not _names_loopback(master_address):
        return own_address(master_address, env)
    return master_address


def client_store(master_address: str, port: int, timeout: timedelta) -> dist.TCPStore:
    """A connection to the store at `master_address`:`port`, which may begin to listen within `timeout`.

    Raises:
        TimeoutError: nobody listens there, or who does is no store and keeps silent.
        RuntimeError: who listens there is no store.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    host = reaching_address(master_address)
    while not _listens(host, port):
        if time.monotonic() > deadline:
            raise TimeoutError(f"nobody listens at {host}:{port}")
        time.sleep(_RETRY_SECONDS)
    try:
        # Towards a listener that never answers, the constructor waits without a limit.
        return answer_within(
            max(deadline - time.monotonic(), 1.0),
            lambda: dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False),
        )
    except NoAnswerError:
        raise TimeoutError(
            f"a program listens at {host}:{port} and does not answer; it is not the store of this run"
        ) from None


def _fits_nccl(wanted: str, name: str) -> bool:
    """True if NCCL may use an interface: `wanted` has beginnings of names, after "=" whole names, after "^" others."""
    excluded = wanted.startswith("^")
    exact = wanted.removeprefix("^").startswith("=")
    parts = [part.partition(":")[0] for part in wanted.lstrip("^=").split(",") if part]  # a port is of no concern
    fits = name in parts if exact else name.startswith(tuple(parts))
    return fits != excluded if parts else True


def _listens(host: str, port: int) -> bool:
    """True if a program listens there. Asked before the store connects, whose retries fill the log with stacks."""
    try:
        socket.create_connection((host, port), timeout=_RETRY_SECONDS * 10).close()
    except OSError:
        return False
    return True


def _source_address(host: str) -> str | None:
    """The address from which this machine would send to `host`; no packet leaves. None if there is no way to it."""
    try:
        targets = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
    except OSError:
        return None
    for family, kind, protocol, _, target in targets:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(target)
                return str(probe.getsockname()[0])
        except OSError:
            continue
    return None


def _address_of(interface: str) -> str | None:
    """The first address of an interface (of a list such as "eth0,eth1": of its first), IPv4 before IPv6."""
    addresses = psutil.net_if_addrs().get(interface.partition(",")[0], [])
    for family in (socket.AF_INET, socket.AF_INET6):
        for entry in addresses:
            if entry.family == family:
                return entry.address.partition("%")[0]
    return None


def _outer_addresses() -> list[str]:
    """IPv4 addresses of the interfaces that are up, but for loopback ones."""
    stats = psutil.net_if_stats()
    return [
        entry.address
        for name, addresses in psutil.net_if_addrs().items()
        for entry in addresses
        if entry.family == socket.AF_INET and not _is_loopback(entry.address) and name in stats and stats[name].isup
    ]


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _names_loopback(host: str) -> bool:
    """True if the user has written a loopback address, or `localhost`, and not a name that happens to lead there."""
    if host == "localhost":
        return True
    try:
        return _is_loopback(host)
    except ValueError:
        return False
