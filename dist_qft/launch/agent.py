"""torchrun's agent on each node, with changes to how ranks restart and how they are stopped.

torchrun restarts ranks after any failure. This agent ends the run instead where a restart cannot help (a mistake of
the user, a corrupt file, numbers that are not finite) or is not wanted (a signal asked the run to stop, another node
has given up). The rest of `--max-restarts` is torchrun's own.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import psutil
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousHandler
from torch.distributed.launcher import api

from dist_qft.errors import CorruptFileError, NumericError, PeerLostError, Preempted, UserError
from dist_qft.launch.rendezvous import NodeRendezvous

_FINAL = tuple(error.exit_code for error in (UserError, CorruptFileError, NumericError, Preempted))
_PEER_LOSS_SECONDS = 10.0
CLEARING_SECONDS = 30  # for ranks that lost a peer: they have nothing to save, but a checkpoint may be being written


@dataclass
class LaunchState:
    """State that the launcher and its agent share.

    Attributes:
        stopping: a signal asked the run to stop, so that no rank starts again.
        deserted: another node ended the run while this one's ranks were waiting for it.
        failures: those of the latest ranks that failed, by rank.
    """

    stopping: bool = False
    deserted: bool = False
    failures: Mapping[int, ProcessFailure] = field(default_factory=dict)


def use_our_agent(state: LaunchState, max_restarts: int) -> None:
    """Have torchrun start our agent; call before `torch.distributed.run.run`."""
    setattr(api, "LocalElasticAgent", partial(Agent, state))  # noqa: B010 - a class, to type checkers
    if max_restarts:
        # For torchrun's own rendezvous: in the agents' store, ranks that start again may read the addresses of those
        # before them.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")


class Agent(LocalElasticAgent):
    """An agent that starts, watches and restarts the ranks of one node."""

    def __init__(self, state: LaunchState, **options: Any) -> None:
        super().__init__(**options)
        self._state = state
        self._closed_at: float | None = None

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._wake_stopped()
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.FAILED:
            self._decide_on_restart(result, worker_group.spec.rdzv_handler)
        elif result.state == WorkerState.HEALTHY and _is_closed(worker_group.spec.rdzv_handler):
            self._leave_with_other_nodes()
        return result

    def _decide_on_restart(self, result: RunResult, rendezvous: RendezvousHandler) -> None:
        self._state.failures = result.failures
        rank, failure = first_failure(result.failures)
        if failure.exitcode in _FINAL or self._state.stopping or _cannot_meet(rendezvous):
            self._remaining_restarts = 0
        if self._remaining_restarts:
            again = f"starting again, {self._remaining_restarts - 1} more restarts left"
            print(f"dist_qft.launch: {ending(rank, failure)}; {again}", file=sys.stderr, flush=True)
        else:
            rendezvous.set_closed()

    def _leave_with_other_nodes(self) -> None:
        """Stop ranks that still run some time after another node has ended the run: they may wait for its ranks.

        Those that wait in C, as for a GPU, do not hear of it and are killed.
        """
        now = time.monotonic()
        self._closed_at = self._closed_at or now
        if self._state.deserted and now - self._closed_at > _PEER_LOSS_SECONDS + CLEARING_SECONDS:
            for process in psutil.Process().children():
                process.kill()
        elif now - self._closed_at > _PEER_LOSS_SECONDS and not self._state.stopping:
            self._state.stopping = self._state.deserted = True
            print("dist_qft.launch: another node has ended the run", file=sys.stderr, flush=True)
            for process in psutil.Process().children():
                process.terminate()

    def _wake_stopped(self) -> None:
        """Wake ranks that are stopped (SIGSTOP) once another has ended: they could not notice, and had to be killed."""
        states = {}
        for pid in self._pcontext.pids().values() if self._pcontext else ():
            with contextlib.suppress(psutil.NoSuchProcess):
                states[pid] = psutil.Process(pid).status()
        if psutil.STATUS_ZOMBIE in states.values():
            for pid, state in states.items():
                if state == psutil.STATUS_STOPPED:
                    os.kill(pid, signal.SIGCONT)


def _is_closed(rendezvous: RendezvousHandler) -> bool:
    """True if a node has ended the run for good; only our rendezvous can tell."""
    return isinstance(rendezvous, NodeRendezvous) and rendezvous.is_closed()


def _cannot_meet(rendezvous: RendezvousHandler) -> bool:
    """True if no new round can come about, since a node has ended the run or the link to node 0 is cut."""
    return _is_closed(rendezvous) or (isinstance(rendezvous, NodeRendezvous) and rendezvous.is_cut_off)


def first_failure(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The first rank that failed by itself, and its failure.

    torchrun dates failures to the second, too coarse to tell a rank's failure from its effect on the peers. So the
    first failure counts that is not a consequence of another: not a lost peer, not SIGTERM, by which torchrun ends the
    ranks that are left, and not SIGABRT, by which NCCL ends those whose collective has timed out.
    """
    effects = (PeerLostError.exit_code, Preempted.exit_code, -signal.SIGTERM, -signal.SIGABRT)
    causes = {rank: failure for rank, failure in failures.items() if failure.exitcode not in effects}
    return min((causes or failures).items(), key=lambda item: item[1].timestamp)


def ending(rank: int, failure: ProcessFailure) -> str:
    """The end of a rank in words, such as "rank 1 was killed by SIGKILL"."""
    if failure.exitcode < 0:
        return f"rank {rank} was killed by {failure.signal_name()}"
    return f"rank {rank} ended with exit code {failure.exitcode}"
