"""The meeting of the launchers of several nodes, at the start and again after a rank was lost.

torchrun's own choices do not fit: its static rendezvous tells the other nodes nothing of a restart, its c10d rendezvous
numbers the nodes by their addresses and not by NODE_RANK, and both listen on all interfaces.

Here the number of nodes is fixed and each has its NODE_RANK. Node 0 serves a store at MASTER_ADDR:MASTER_PORT, and for
each round a fresh one for that round's ranks, which outlives them: it can still say which rank was lost. A node with
failed ranks asks for the next round; the others notice, stop their ranks, and come to it. Keys of the store: `round`,
the highest round that somebody asked for; `<round>/node/<n>`, who came to it as node n; `<round>/ranks`, the address of
its ranks' store; `closed`, set when a node has ended for good.
"""

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStateError,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
    rendezvous_handler_registry,
)

from dist_qft.ranks.network import LOOPBACK, client_store, listening_address, listening_store
from dist_qft.ranks.patience import NoAnswerError, answer_within

BACKEND = "dist_qft"

_POLL_SECONDS = 0.2
_PATIENCE_SECONDS = 10.0
_STORE_TIMEOUT = timedelta(seconds=60)
_ANSWER_SECONDS = 10.0

T = TypeVar("T")


class NodeRendezvous(RendezvousHandler):
    """The meeting of `nodes` launchers, of which this is number `node`.

    Args:
        host, port: where node 0 listens; unused on a single node.
        timeout_seconds: how long a round waits for all nodes.
    """

    def __init__(self, nodes: int, node: int, host: str, port: int, timeout_seconds: float, run_id: str = "") -> None:
        self._nodes, self._node, self._host, self._port = nodes, node, host, port
        self._timeout_seconds, self._run_id = timeout_seconds, run_id
        self._round = 0
        self._store: dist.Store | None = None
        self._ranks_store: dist.TCPStore | None = None
        self._identity = f"{socket.gethostname()}:{os.getpid()}"
        self._closed = False
        self._owed: NoAnswerError | None = None

    def get_backend(self) -> str:
        return BACKEND

    def get_run_id(self) -> str:
        return self._run_id

    @property
    def use_agent_store(self) -> bool:
        """True if the ranks find their store here, rather than have rank 0 serve one."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for all nodes, and return this round's place and stores.

        Raises:
            RendezvousConnectionError: no store at `host`:`port`, or the port is in use.
            RendezvousTimeoutError: not all nodes came.
            RendezvousClosedError: another node has ended for good.
            RendezvousStateError: two nodes have the same number.
        """
        deadline = time.monotonic() + self._timeout_seconds
        if self._store is None:
            self._store = self._open_store()
        self._round = self._ask_for_round()
        if self._node == 0:
            self._serve_ranks()
        self._store.set(self._key(f"node/{self._node}"), self._identity)
        self._await_nodes(deadline)
        host, _, port = self._store.get(self._key("ranks")).decode().rpartition(" ")
        own = dist.PrefixStore(f"round-{self._round}", self._store)
        return RendezvousInfo(own, self._node, self._nodes, RendezvousStoreInfo(host, int(port)))

    def num_nodes_waiting(self) -> int:
        """1 if another node asks for a new round, for which this node's ranks must stop."""
        if self._store is None or self.is_closed():
            return 0
        try:
            return int(self._ask(lambda: self._highest_round() > self._round))
        except (NoAnswerError, RuntimeError):
            return 0

    def is_closed(self) -> bool:
        """True if a node has ended for good; so has node 0 if its store is gone."""
        if not self._closed and self._store is not None:
            try:
                self._closed = self._ask(lambda: self._meeting.check(["closed"]))
            except NoAnswerError:
                return False
            except RuntimeError:
                self._closed = True
        return self._closed

    @property
    def is_cut_off(self) -> bool:
        """True if the store has not answered in time: this node can meet no other then."""
        return self._owed is not None and not self._owed.answered.is_set()

    def set_closed(self) -> None:
        self._closed = True
        if self._store is not None:
            with contextlib.suppress(NoAnswerError, RuntimeError):
                self._ask(lambda: self._meeting.set("closed", "1"))

    def shutdown(self) -> bool:
        """Do nothing when this launcher ends: the agent calls `set_closed` if all nodes are to end."""
        return True

    def _ask(self, request: Callable[[], T]) -> T:
        """The result of a request to the store, which may be behind a cut link.

        Raises:
            NoAnswerError: this request, or the one before it, has had no answer for `_ANSWER_SECONDS`.
            RuntimeError: the store is gone.
        """
        if self._node == 0:
            return request()
        if self._owed is not None and self.is_cut_off:
            raise self._owed
        try:
            return answer_within(_ANSWER_SECONDS, request)
        except NoAnswerError as error:
            self._owed = error
            raise

    def _key(self, name: str) -> str:
        return f"{self._round}/{name}"

    def _open_store(self) -> dist.Store:
        if self._nodes == 1:
            return dist.HashStore()
        try:
            if self._node == 0:
                return listening_store(listening_address(False, self._host), self._port, _STORE_TIMEOUT)
            return client_store(self._host, self._port, timedelta(seconds=self._timeout_seconds))
        except (OSError, RuntimeError) as error:
            raise RendezvousConnectionError(str(error).partition("\n")[0]) from error

    @property
    def _meeting(self) -> dist.Store:
        """The store of the launchers."""
        assert self._store is not None, "next_rendezvous opens it first"
        return self._store

    def _ask_for_round(self) -> int:
        """The round to come to: the next one, or a later one that others wait in."""
        highest = self._highest_round()
        if highest > self._round:
            everyone = [f"{highest}/node/{node}" for node in range(self._nodes)]
            # A node that was started anew comes to a job that runs: a round that is complete goes on without it.
            wanted = highest + 1 if self._meeting.check(everyone) else highest
        else:
            wanted = self._round + 1
        if wanted > highest:
            self._meeting.set("round", str(wanted))
        return wanted

    def _highest_round(self) -> int:
        return int(self._meeting.get("round")) if self._meeting.check(["round"]) else 0

    def _serve_ranks(self) -> None:
        """A fresh store for this round's ranks: in an old one they would find the addresses of those before them."""
        address = listening_address(self._nodes == 1, self._host)
        self._ranks_store = listening_store(address, 0, _STORE_TIMEOUT)
        host = LOOPBACK if self._nodes == 1 else self._host
        self._meeting.set(self._key("ranks"), f"{host} {self._ranks_store.port}")

    def _await_nodes(self, deadline: float) -> None:
        speak_at = time.monotonic() + _PATIENCE_SECONDS
        while missing := [n for n in range(self._nodes) if not self._meeting.check([self._key(f"node/{n}")])]:
            if self.is_closed():
                raise RendezvousClosedError("another node has ended the run")
            names = f"node {', '.join(map(str, missing))} of {self._nodes}"
            if time.monotonic() > deadline:
                raise RendezvousTimeoutError(f"{names} did not come within {self._timeout_seconds:g} s")
            if time.monotonic() > speak_at and self._node == 0:
                speak_at = deadline
                print(f"dist_qft.launch: waiting for {names} at {self._host}:{self._port}", file=sys.stderr, flush=True)
            time.sleep(_POLL_SECONDS)
        present = self._meeting.get(self._key(f"node/{self._node}")).decode()
        if present != self._identity:
            raise RendezvousStateError(f"two launchers are node {self._node}: {present} and {self._identity}")


def use_our_rendezvous() -> None:
    """Make `BACKEND` known to torchrun; its parameters `nodes`, `node` and `timeout` come in `--rdzv-conf`."""
    rendezvous_handler_registry.register(BACKEND, _create)


def _create(parameters: RendezvousParameters) -> NodeRendezvous:
    host, _, port = parameters.endpoint.rpartition(":")
    node, timeout = int(parameters.get("node", 0)), int(parameters.get("timeout", 600))
    return NodeRendezvous(parameters.max_nodes, node, host, int(port), timeout, parameters.run_id)
