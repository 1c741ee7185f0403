"""A watch that ends this rank when a peer is lost and the main thread cannot notice.

On CUDA a lost peer raises nothing: the main thread waits in C for a kernel that waits for the peer, no Python handler
runs, and after the timeout NCCL ends the process by SIGABRT, without a report. On CPUs gloo raises an error in the main
thread, which is then given the time to leave by itself.

Two threads, because a call to the store can take many minutes where the network to it is cut: one asks, and the other
decides by the answers and their age.
"""

import contextlib
import threading
import time
from collections.abc import Callable

from torch.distributed import Store

from dist_qft.ranks.heartbeat import Heartbeat, rank_names
from dist_qft.ranks.local_peers import LocalPeers

POLL_SECONDS = 1.0
_ASLEEP_SECONDS = 5.0  # a thread that polls, and has not for so long, was stopped with its process


class PeerWatch:
    """Context that ends this rank if a peer is lost and the context is not left within `grace_seconds`.

    A peer is lost if its process on this machine has ended, if its heartbeat is silent for `silence_seconds`, or if
    another rank says so. A peer that left in order, or because of another one, is not.

    Args:
        silence_seconds: less than the timeout of the collectives, so that this report comes before NCCL's abort.
        grace_seconds: for a main thread that gets an error of its own.
        end: is called with the text about the lost peer, in a thread; must not return.
    """

    def __init__(
        self,
        heartbeat: Heartbeat,
        local: LocalPeers,
        *,
        silence_seconds: float,
        grace_seconds: float,
        end: Callable[[str], None],
    ) -> None:
        self._heartbeat, self._local, self._end = heartbeat, local, end
        self._silence_seconds, self._grace_seconds = silence_seconds, grace_seconds
        self._left = threading.Event()
        self._found: str | None = None
        self._beat, self._beat_came, self._answer_came = "", 0.0, 0.0

    def __enter__(self) -> "PeerWatch":
        self._beat_came = self._answer_came = time.monotonic()
        for target in (self._ask, self._decide):
            threading.Thread(target=target, name="peer watch", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._left.set()

    def _ask(self) -> None:
        ended_before: set[int] = set()
        with contextlib.suppress(RuntimeError):  # the store is gone: its silence is noticed
            store = self._heartbeat.connection()
            while self._found is None and not self._left.wait(POLL_SECONDS):
                ended = set(self._local.ended(patience_seconds=0.0))
                # Those of the round before: a rank says that it leaves, and ends a moment later.
                missed = [r for r in sorted(ended & ended_before) if self._heartbeat.is_missed(store, r)]
                gone = f"{rank_names(missed)} is gone" if missed else None
                self._found = gone or self._heartbeat.told_lost(store) or self._silent(store)
                ended_before, self._answer_came = ended, time.monotonic()

    def _silent(self, store: Store) -> str | None:
        rank, now = self._heartbeat.next_rank, time.monotonic()
        beat = self._heartbeat.beat_of(store, rank)
        if beat != self._beat:
            self._beat, self._beat_came = beat, now
        if now - self._beat_came < self._silence_seconds or not self._heartbeat.is_missed(store, rank):
            return None
        return f"rank {rank} does not answer, last heard of at {beat.partition(' ')[2] or 'start-up'}"

    def _decide(self) -> None:
        polled = time.monotonic()
        while not self._left.wait(POLL_SECONDS):
            if time.monotonic() - polled > _ASLEEP_SECONDS:
                self._answer_came = time.monotonic()  # this rank asked nothing: the store's silence says nothing
            polled = time.monotonic()
            lost = self._found
            if lost is None and time.monotonic() - self._answer_came > self._silence_seconds:
                lost = "rank 0 does not answer"  # it, or its launcher, serves the store
            if lost is not None:
                self._heartbeat.tell_lost(lost)
                if not self._left.wait(self._grace_seconds):
                    self._end(lost)
                return
