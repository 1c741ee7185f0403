"""The networks that a side's ranks get: their own loopback interface, or two nodes with a link between them.

All by Linux namespaces, without root where users may have their own. The counters of such an interface hold the ranks'
bytes alone, and it can be slowed down (`tc`, token bucket). Elsewhere the ranks share the machine's loopback.
"""

import functools
import shutil
import subprocess
from dataclasses import dataclass

# Node 1 is a second namespace, kept alive by a process that sleeps, at the other end of a virtual cable. Traffic within
# a node goes through its loopback interface, which nothing slows down.
_TWO_NODES = """
ip link set lo up
unshare --net sleep 3600 &
other=$!
trap 'kill $other' EXIT
while [ "$(readlink /proc/$other/ns/net)" = "$(readlink /proc/$$/ns/net)" ]; do sleep 0.02; done
on_other() { nsenter --net=/proc/$other/ns/net "$@"; }
ip link add wire type veth peer name wire netns $other
ip address add 10.213.0.1/24 dev wire
ip link set wire up
on_other ip link set lo up
on_other ip address add 10.213.0.2/24 dev wire
on_other ip link set wire up
if [ -n "$MEGABITS" ]; then
  tc qdisc add dev wire root tbf rate ${MEGABITS}mbit burst 256kb latency 400ms
  on_other tc qdisc add dev wire root tbf rate ${MEGABITS}mbit burst 256kb latency 400ms
fi
first= second=
for rank in $RANKS; do
  if [ $rank -lt $LOCAL_WORLD_SIZE ]; then first="$first $rank"; else second="$second $rank"; fi
done
export RANKS="$first"; "$@" & here=$!
export RANKS="$second"; on_other "$@" & there=$!
wait $here
wait $there
"""


@dataclass(frozen=True)
class Network:
    """A network of a side.

    Attributes:
        nodes: 1 or 2; the ranks are spread over them evenly, in their order.
        megabits: the speed of the loopback interface, both directions together, or of the link between the nodes, each
            way, in megabits per second; None does not slow it down.
    """

    nodes: int = 1
    megabits: int | None = None

    @property
    def interface(self) -> str:
        """The interface whose counters count, and through which the ranks meet."""
        return "wire" if self.nodes > 1 else "lo"

    def environment(self, ranks: int) -> dict[str, str]:
        """The variables that the ranks and `command` need; RANKS are the ranks of a node to the command behind it."""
        return {
            "RANKS": " ".join(map(str, range(ranks))),
            "LOCAL_WORLD_SIZE": str(ranks // self.nodes),
            "MASTER_ADDR": "10.213.0.1" if self.nodes > 1 else "127.0.0.1",
            "GLOO_SOCKET_IFNAME": self.interface,
            "MEGABITS": str(self.megabits or ""),
        }

    def command(self) -> list[str]:
        """A command prefix that starts the command behind it once per node of this network, and waits for all."""
        if self.nodes > 1:
            return [*_UNSHARE, "sh", "-ec", _TWO_NODES, "sh"]
        return _own_loopback(self.megabits) if isolated() else []


@functools.cache
def isolated() -> bool:
    """True if ranks can have a network of their own here."""
    if not all(map(shutil.which, ("unshare", "ip"))):
        return False
    return subprocess.run([*_own_loopback(None), "true"], capture_output=True).returncode == 0


@functools.cache
def can_slow_down() -> bool:
    """True if that network can be slowed down."""
    if not (isolated() and shutil.which("tc")):
        return False
    return subprocess.run([*_own_loopback(1000), "true"], capture_output=True).returncode == 0


@functools.cache
def can_be_two_nodes() -> bool:
    """True if this machine can pretend to be two nodes with a slow link between them."""
    if not (can_slow_down() and shutil.which("nsenter")):
        return False
    network = Network(2, 1000)
    words = [*network.command(), "true"]
    return subprocess.run(words, env=_PATH | network.environment(2), capture_output=True).returncode == 0


_PATH = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
_UNSHARE = ["unshare", "--map-root-user", "--net"]


def _own_loopback(megabits: int | None) -> list[str]:
    """A command prefix that runs the command behind it in a network namespace of its own."""
    setup = "ip link set lo up"
    if megabits is not None:
        setup += f" && tc qdisc add dev lo root tbf rate {megabits}mbit burst 256kb latency 400ms"
    return [*_UNSHARE, "sh", "-c", f'{setup} && exec "$@"', "sh"]
