"""The other ranks of a run while it is connected, and what a broken collective says about them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

from dist_qft.errors import DistQFTError, PeerLostError
from dist_qft.ranks.crash import last_collective
from dist_qft.ranks.heartbeat import Heartbeat
from dist_qft.ranks.local_peers import LocalPeers


class Peers:
    """Finds out which rank was lost, from ended processes and heartbeats. Construction is collective.

    Args:
        doing: returns this rank's present activity, such as "step 12".
    """

    def __init__(self, doing: Callable[[], str]) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.doing = doing
        self._local = LocalPeers()
        self._heartbeat = Heartbeat(self.rank, self.world_size, doing)

    def lost_rank(self) -> str | None:
        """Name the rank whose failure makes this rank exit, such as "rank 1 is gone"; None if unknown. Up to 16 s."""
        return self._heartbeat.lost_rank(set(self._local.ended()))

    def close(self) -> None:
        """Stop watching."""
        self._heartbeat.close()


@contextmanager
def peer_loss_reported(peers: Peers) -> Iterator[None]:
    """Inside, a failed collective becomes PeerLostError, and errors of this rank alone get its number."""
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
        what = peers.lost_rank() or "another rank is gone or did not answer in time"
        lost = PeerLostError(f"{peers.doing()}: {what}; {last_collective(error)} failed ({reason})")
        lost.rank_prefix = prefix
        raise lost from error


def _is_collective_failure(error: RuntimeError) -> bool:
    text = str(error)
    return isinstance(error, dist.DistError) or any(
        sign in text for sign in ("gloo", "Gloo", "NCCL", "Connection closed by peer", "Timed out waiting")
    )
