"""Signs of life: which ranks do not answer when a collective fails, and what each was at when last heard of.

A thread on each rank writes twice a second into the store through which the ranks met. A rank that is stopped, hangs in
C or lost its network writes no more; one that merely never came to the collective still says what it is at. Not here:
processes of this machine that ended (neighbours.py), which is known at once.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

_BEAT_SECONDS = 0.5
_SILENCE_SECONDS = 2.5  # without a sign for so long, a rank counts as silent
_STORE_TIMEOUT = timedelta(seconds=5)
_ANSWER_SECONDS = 15  # for all questions to the store together; it has no limit of its own for most of them


class RollCall:
    """This rank's signs, from its making until `close`; made by every rank.

    Args:
        doing: what the run is at, such as "step 12".
    """

    def __init__(self, rank: int, world_size: int, doing: Callable[[], str]) -> None:
        self._rank, self._others = rank, [other for other in range(world_size) if other != rank]
        self._doing = doing
        self._ended = threading.Event()
        if not self._others:
            return
        # A connection of its own: a wait of the main thread on the shared one would hold it up.
        self._store = dist.distributed_c10d._get_default_store().clone()
        self._store.set_timeout(_STORE_TIMEOUT)
        self._store.set(_sign(rank), f"0 {doing()}")
        threading.Thread(target=self._beat, name="signs of life", daemon=True).start()

    def close(self) -> None:
        """Give no more signs."""
        self._ended.set()

    def culprit(self, ended: set[int]) -> str | None:
        """Whose loss it was that this rank leaves of, given the ranks of this machine that have ended; None if unknown.

        Where the network to the store is cut, its calls come back after many minutes: a thread waits for them.
        """
        answers: list[str | None] = []
        thread = threading.Thread(target=lambda: answers.append(self._ask(ended)), daemon=True)
        thread.start()
        thread.join(_ANSWER_SECONDS)
        return answers[0] if answers else "rank 0 does not answer"

    def _ask(self, ended: set[int]) -> str | None:
        self._leave()
        gone = ended - self._leavers()  # not one that only left because of the culprit
        return f"{_ranks(sorted(gone))} is gone" if gone else self._missing()

    def _leave(self) -> None:
        """Tell the others that this rank goes because of them, so that none takes it for the culprit."""
        if self._others:
            with contextlib.suppress(RuntimeError):
                self._store.set(_left(self._rank), "1")

    def _leavers(self) -> set[int]:
        """The ranks that went because of others."""
        with contextlib.suppress(RuntimeError):
            return {other for other in self._others if self._store.check([_left(other)])}
        return set()

    def _missing(self) -> str | None:
        """Who keeps the others waiting, such as "rank 3 does not answer"; None if all answer alike. Takes a moment."""
        try:
            before = self._signs()
            time.sleep(_SILENCE_SECONDS)
            after, left = self._signs(), self._leavers()
        except RuntimeError:
            return "rank 0 does not answer" if self._rank else None  # the store is in its process, or its launcher's
        silent = [rank for rank in self._others if rank not in left and before[rank] == after[rank]]
        if silent:
            at = after[silent[0]].partition(" ")[2] or "start-up"
            return f"{_ranks(silent)} {'does' if len(silent) == 1 else 'do'} not answer, last heard of at {at}"
        elsewhere = {rank: sign.partition(" ")[2] for rank, sign in after.items() if rank not in left}
        elsewhere = {rank: at for rank, at in elsewhere.items() if at != self._doing()}
        if elsewhere:
            at = next(iter(elsewhere.values()))
            return f"{_ranks(list(elsewhere))} did not come and is at {at}"
        return None

    def _signs(self) -> dict[int, str]:
        keys = [_sign(rank) for rank in self._others if self._store.check([_sign(rank)])]
        values = dict(zip(keys, self._store.multi_get(keys), strict=True)) if keys else {}
        return {rank: values.get(_sign(rank), b"").decode() for rank in self._others}

    def _beat(self) -> None:
        count = 0
        with contextlib.suppress(RuntimeError):  # the store went away: so will this rank
            while not self._ended.wait(_BEAT_SECONDS):
                count += 1
                self._store.set(_sign(self._rank), f"{count} {self._doing()}")


def _sign(rank: int) -> str:
    return f"dist_qft/sign/{rank}"


def _left(rank: int) -> str:
    return f"dist_qft/left/{rank}"


def _ranks(ranks: list[int]) -> str:
    return f"rank {', '.join(map(str, ranks))}"
