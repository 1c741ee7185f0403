"""The address on which the master listens and the others come, when names do not lead where they should."""

import socket
from datetime import timedelta

import pytest

from dist_qft.errors import SetupError
from dist_qft.ranks import network
from dist_qft.ranks.network import (
    client_store,
    interface_of,
    listening_address,
    listening_store,
    own_address,
    require_interfaces,
)

SECONDS = timedelta(seconds=20)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Names and their addresses, as /etc/hosts has them; others are looked up as usual; no interface is set."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    hosts: dict[str, str] = {}
    look_up = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *more, **options: look_up(hosts.get(host, host), *more, **options)
    )
    return hosts


@pytest.mark.parametrize("address", ["127.0.1.1", "127.0.0.1"])
def test_a_master_whose_own_name_leads_to_loopback_is_met_all_the_same(names, address):
    """As Debian's /etc/hosts has it: the master must not listen there, where no other node comes."""
    names["node1"] = address
    listens = listening_address(False, "node1", env={})
    server = listening_store(listens, 0, SECONDS)
    server.set("key", "value")
    assert client_store("node1", server.port, SECONDS).get("key") == b"value"
    if outer := network._outer_addresses():
        assert listens == ("" if len(outer) > 1 else outer[0])


def test_a_loopback_address_that_was_asked_for_is_taken():
    assert listening_address(False, "127.0.0.1", env={}) == own_address("127.0.0.1", env={}) == "127.0.0.1"
    assert listening_address(True, "node-that-nobody-knows", env={}) == "127.0.0.1"


def test_the_interface_that_the_user_names_wins():
    name = interface_of("127.0.0.1")
    assert own_address("198.51.100.7", env={"GLOO_SOCKET_IFNAME": name}) == "127.0.0.1"
    chosen = {"GLOO_SOCKET_IFNAME": "eth7", "NCCL_SOCKET_IFNAME": "ib0"}
    network.choose_interface(True, "127.0.0.1", env=chosen)
    assert chosen == {"GLOO_SOCKET_IFNAME": "eth7", "NCCL_SOCKET_IFNAME": "ib0"}
    unset: dict[str, str] = {}
    network.choose_interface(True, "127.0.0.1", env=unset)
    assert unset == {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"}


@pytest.mark.parametrize("wanted", ["", "lo", "eth7,lo", "=lo", "l", "^eth,ib", "^=l", "lo:4000"])
def test_an_interface_that_nccl_may_use_is_accepted(wanted):
    require_interfaces(nccl=True, env={"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": wanted})


@pytest.mark.parametrize(
    ("variable", "wanted", "said"),
    [
        ("GLOO_SOCKET_IFNAME", "lo,eth77", "got eth77, must be one of lo"),
        ("GLOO_SOCKET_IFNAME", "l", "got l, must be one of lo"),
        ("NCCL_SOCKET_IFNAME", "eth77", "got eth77, must fit one of lo"),
        ("NCCL_SOCKET_IFNAME", "=l", "got =l, must fit one of lo"),
    ],
)
def test_an_interface_that_is_not_here_is_refused_by_its_variable(monkeypatch, variable, wanted, said):
    monkeypatch.setattr(network.psutil, "net_if_addrs", lambda: {"lo": []})
    with pytest.raises(SetupError, match=f"^{variable}: {said}"):
        require_interfaces(nccl=True, env={variable: wanted})
    require_interfaces(nccl=False, env={"NCCL_SOCKET_IFNAME": wanted})
