"""The other ranks of a connected run: which one is lost, and the error that a broken collective becomes."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist

from dist_qft.errors import DistQFTError, PeerLostError
from dist_qft.ranks.crash import last_collective
from dist_qft.ranks.heartbeat import Heartbeat
from dist_qft.ranks.local_peers import LocalPeers
from dist_qft.ranks.peer_watch import PeerWatch

# How long after a loss the main thread may take to leave by itself. gloo tells it at its next collective, NCCL never.
GRACE_SECONDS = {"cpu": 20.0, "cuda": 1.0}
_BEFORE_TIMEOUT_SECONDS = 5.0
_ALL_FAIL_SECONDS = 10.0  # in which ranks that make the same error have all made it


class Peers:
    """The detector of a lost rank, by ended processes and heartbeats. Construction is collective.

    Args:
        doing: returns this rank's present activity, such as "step 12".
        timeout_seconds: that of the collectives.
    """

    def __init__(self, doing: Callable[[], str], device: torch.device, timeout_seconds: float) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.doing = doing
        self._device, self._timeout_seconds = device, timeout_seconds
        self._local = LocalPeers(device)
        self._heartbeat = Heartbeat(self.rank, self.world_size, doing)

    def lost_rank(self) -> str | None:
        """Name the lost rank that makes this one exit, such as "rank 1 is gone"; None if unknown. Takes up to 16 s."""
        lost = self._heartbeat.lost_rank(set(self._local.ended()))
        if lost is not None:
            self._heartbeat.tell_lost(lost)  # to ranks that cannot notice
        return lost

    def all_failed(self, what: str) -> bool:
        """True if every rank fails at `what`, each in this call; False if one goes on. Takes up to 10 s.

        For an error that a rank cannot tell others of by a collective, since it does not know where they are.
        """
        return self._heartbeat.all_failed(what, _ALL_FAIL_SECONDS)

    def watch(self, end: Callable[[str], None]) -> AbstractContextManager[object]:
        """Context in which `end` is called if a peer is lost and the main thread does not notice; see `PeerWatch`."""
        if self.world_size == 1:
            return nullcontext()
        return PeerWatch(
            self._heartbeat,
            self._local,
            silence_seconds=max(self._timeout_seconds - _BEFORE_TIMEOUT_SECONDS, self._timeout_seconds / 2),
            grace_seconds=GRACE_SECONDS[self._device.type],
            end=end,
        )

    def close(self, *, in_order: bool) -> None:
        """Stop the heartbeat; `in_order` tells the others not to miss this rank."""
        self._heartbeat.close(in_order=in_order)


@contextmanager
def peer_loss_reported(peers: Peers) -> Iterator[None]:
    """Context in which a failed collective becomes PeerLostError, and errors of this rank alone get its number."""
    prefix = f"rank {peers.rank}"
    try:
        yield
    except DistQFTError as error:
        if not error.everywhere:
            error.rank_prefix = prefix
        raise
    except RuntimeError as error:
        if not _is_collective_failure(error):
            raise
        reason = str(error).strip().splitlines()[0]
        loss = peers.lost_rank() or "another rank is gone or did not answer in time"
        lost = PeerLostError(f"{peers.doing()}: {loss}; {last_collective(error)} failed ({reason})")
        lost.rank_prefix = prefix
        raise lost from error


def _is_collective_failure(error: RuntimeError) -> bool:
    text = str(error)
    return isinstance(error, dist.DistError) or any(
        sign in text for sign in ("gloo", "Gloo", "NCCL", "Connection closed by peer", "Timed out waiting")
    )
