"""torchrun's agent on each node, with a say in when its ranks start again and in how stopped ones end.

torchrun restarts ranks whatever ended them. Where starting again cannot help (a mistake, a corrupt file, numbers that
are not finite) or is not wanted (a signal asked the run to stop) the run ends at once instead. The rest of
`--max-restarts` is torchrun's own.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Mapping

import psutil
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.launcher import api

from dist_qft.errors import CorruptFileError, NumericError, PeerLostError, Preempted, UserError

_FINAL = tuple(error.exit_code for error in (UserError, CorruptFileError, NumericError, Preempted))


def use_our_agent(max_restarts: int) -> None:
    """Have torchrun start our agent; call before `torch.distributed.run.run`."""
    api.LocalElasticAgent = Agent
    if max_restarts:
        # With the agents' own store, ranks that start again may read the addresses of those before them.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")


class Agent(LocalElasticAgent):
    """Ends what need not start again, says what does, and lets stopped ranks hear that they are to end."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._wake_stopped()
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.FAILED:
            rank, failure = first_failure(result.failures)
            if failure.exitcode in _FINAL:
                self._remaining_restarts = 0
            elif self._remaining_restarts:
                again = f"starting again, {self._remaining_restarts - 1} more restarts left"
                print(f"dist_qft.launch: {ending(rank, failure)}; {again}", file=sys.stderr, flush=True)
        return result

    def _wake_stopped(self) -> None:
        """Where a rank has ended, wake those that are stopped (SIGSTOP): they would have to be killed."""
        states = {}
        for pid in self._pcontext.pids().values() if self._pcontext else ():
            with contextlib.suppress(psutil.NoSuchProcess):
                states[pid] = psutil.Process(pid).status()
        if psutil.STATUS_ZOMBIE in states.values():
            for pid, state in states.items():
                if state == psutil.STATUS_STOPPED:
                    os.kill(pid, signal.SIGCONT)


def first_failure(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The rank whose failure caused the others'.

    torchrun dates failures to the second, too coarse to tell a rank's failure from what it does to its peers. So
    what can be an effect (a lost peer, or SIGTERM, with which torchrun clears the other ranks away) yields to
    what cannot.
    """
    effects = (PeerLostError.exit_code, Preempted.exit_code, -signal.SIGTERM)
    causes = {rank: failure for rank, failure in failures.items() if failure.exitcode not in effects}
    return min((causes or failures).items(), key=lambda item: item[1].timestamp)


def ending(rank: int, failure: ProcessFailure) -> str:
    """How a rank ended, such as "rank 1 was killed by SIGKILL"."""
    if failure.exitcode < 0:
        return f"rank {rank} was killed by {failure.signal_name()}"
    return f"rank {rank} ended with exit code {failure.exitcode}"
