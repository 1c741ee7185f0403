"""Heartbeats: which ranks do not answer when a collective fails, and the last known activity of each.

A thread on each rank writes twice a second into the store through which the ranks met. The beats of a rank that is
stopped, hangs in C or lost its network stop; a rank that merely never came to the collective still says its
activity. Processes of this machine that have ended are known sooner: see local_peers.py. A rank also writes that it
exits because of another (`exit`), that it left in order (`left`), and that it found a rank lost (`lost`).
"""

import contextlib
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from dist_qft.ranks.patience import NoAnswerError, answer_within

_LOST = "dist_qft/lost"
_BEAT_SECONDS = 0.5
_SILENCE_SECONDS = 2.5  # a rank without a beat for so long counts as silent
_STORE_TIMEOUT = timedelta(seconds=5)
_TELLING_SECONDS = 2.0
_ANSWER_SECONDS = 15  # for all questions to the store together; it has no limit of its own for most of them


class Heartbeat:
    """This rank's heartbeat, from construction until `close`. Every rank makes one.

    Args:
        doing: returns the rank's present activity, such as "step 12".
    """

    def __init__(self, rank: int, world_size: int, doing: Callable[[], str]) -> None:
        self._rank, self._others = rank, [other for other in range(world_size) if other != rank]
        self._doing = doing
        self._ended = threading.Event()
        if not self._others:
            return
        self._store = self.connection()
        self._store.set(_beat_key(rank), f"0 {doing()}")
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def connection(self) -> dist.Store:
        """A connection to the store for one thread: while another waits on a connection, nobody else can use it."""
        shared = dist.distributed_c10d._get_default_store()
        store: dist.Store = shared.clone()  # type: ignore[attr-defined]  # not in torch's stubs
        store.set_timeout(_STORE_TIMEOUT)
        return store

    def close(self, *, in_order: bool) -> None:
        """Stop the heartbeat; `in_order` tells the others not to miss this rank."""
        self._ended.set()
        if self._others and in_order:
            with contextlib.suppress(RuntimeError):
                self._store.set(_left_key(self._rank), "1")

    @property
    def next_rank(self) -> int:
        """The only rank that this one watches: the work of the store then grows with the ranks, not their square."""
        return (self._rank + 1) % (len(self._others) + 1)

    def beat_of(self, store: dist.Store, rank: int) -> str:
        """The latest beat of a rank, "<count> <activity>", or "" before its first."""
        return store.get(_beat_key(rank)).decode() if store.check([_beat_key(rank)]) else ""

    def is_missed(self, store: dist.Store, rank: int) -> bool:
        """True if a rank that has ended did so neither in order nor because of another."""
        return not store.check([_left_key(rank)]) and not store.check([_exit_key(rank)])

    def told_lost(self, store: dist.Store) -> str | None:
        """The words of another rank about a lost one, such as "rank 3 is gone"; None if there are none.

        A rank that was stopped and woken finds itself lost: that does not count.
        """
        told = store.get(_LOST).decode() if store.check([_LOST]) else None
        return None if told is not None and told.startswith(f"rank {self._rank} ") else told

    def tell_lost(self, text: str) -> None:
        """Say to all ranks which one was lost, unless the store does not answer in time."""
        with contextlib.suppress(NoAnswerError, RuntimeError):
            answer_within(_TELLING_SECONDS, lambda: self.connection().set(_LOST, text))

    def all_failed(self, what: str, seconds: float) -> bool:
        """Tell the others that this rank failed at `what`; True once all have said so, False if one has not in time."""
        deadline = time.monotonic() + seconds

        def told() -> bool:
            store = self.connection()
            store.set(_failed_key(what, self._rank), "1")
            while not store.check([_failed_key(what, other) for other in self._others]):
                if time.monotonic() > deadline:
                    return False
                time.sleep(_BEAT_SECONDS / 5)
            return True

        try:
            return not self._others or answer_within(seconds + _TELLING_SECONDS, told)
        except (NoAnswerError, RuntimeError):
            return False

    def lost_rank(self, ended: set[int]) -> str | None:
        """Name the lost rank that makes this one exit, such as "rank 1 is gone"; None if unknown.

        Takes up to 15 s. Where the network to the store is cut, calls to it return only after many minutes, so they
        are made in a thread that is then abandoned.

        Args:
            ended: the ranks of this machine that have ended.
        """
        try:
            return answer_within(_ANSWER_SECONDS, lambda: self._find_lost(ended))
        except NoAnswerError:
            return "rank 0 does not answer"

    def _find_lost(self, ended: set[int]) -> str | None:
        self._announce_exit()
        gone = ended - self._exiting()  # a rank that exits because of another is not the lost one
        return f"{rank_names(sorted(gone))} is gone" if gone else self._silent_or_late()

    def _announce_exit(self) -> None:
        """Tell the others that this rank exits because of another, so that none takes it for the lost one."""
        if self._others:
            with contextlib.suppress(RuntimeError):
                self._store.set(_exit_key(self._rank), "1")

    def _exiting(self) -> set[int]:
        """The ranks that exit because of another."""
        with contextlib.suppress(RuntimeError):
            return {other for other in self._others if self._store.check([_exit_key(other)])}
        return set()

    def _silent_or_late(self) -> str | None:
        """Name the rank that keeps the others waiting, such as "rank 3 does not answer"; None if all are alike."""
        try:
            before = self._beats()
            time.sleep(_SILENCE_SECONDS)
            after, exiting, told = self._beats(), self._exiting(), self.told_lost(self._store)
        except RuntimeError:
            return "rank 0 does not answer" if self._rank else None  # rank 0 or its launcher serves the store
        if told is not None:
            return told  # by a rank of that machine, which knows better
        silent = [rank for rank in self._others if rank not in exiting and before[rank] == after[rank]]
        if silent:
            activity = after[silent[0]].partition(" ")[2] or "start-up"
            return (
                f"{rank_names(silent)} {'does' if len(silent) == 1 else 'do'} not answer, last heard of at {activity}"
            )
        elsewhere = {rank: beat.partition(" ")[2] for rank, beat in after.items() if rank not in exiting}
        elsewhere = {rank: activity for rank, activity in elsewhere.items() if activity != self._doing()}
        if elsewhere:
            activity = next(iter(elsewhere.values()))
            return f"{rank_names(list(elsewhere))} did not come and is at {activity}"
        return None

    def _beats(self) -> dict[int, str]:
        """The latest beat of each other rank, "<count> <activity>", or "" before its first."""
        keys = [_beat_key(rank) for rank in self._others if self._store.check([_beat_key(rank)])]
        values = dict(zip(keys, self._store.multi_get(keys), strict=True)) if keys else {}
        return {rank: values.get(_beat_key(rank), b"").decode() for rank in self._others}

    def _beat(self) -> None:
        count = 0
        with contextlib.suppress(RuntimeError):  # the store is gone, so this rank will soon be, too
            while not self._ended.wait(_BEAT_SECONDS):
                count += 1
                self._store.set(_beat_key(self._rank), f"{count} {self._doing()}")


def _beat_key(rank: int) -> str:
    return f"dist_qft/beat/{rank}"


def _exit_key(rank: int) -> str:
    return f"dist_qft/exit/{rank}"


def _left_key(rank: int) -> str:
    return f"dist_qft/left/{rank}"


def _failed_key(what: str, rank: int) -> str:
    return f"dist_qft/failed/{what}/{rank}"


def rank_names(ranks: list[int]) -> str:
    """The ranks in words, such as "rank 1, 3"."""
    return f"rank {', '.join(map(str, ranks))}"
