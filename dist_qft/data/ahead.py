"""The next step's micro-batches, made by a thread while a GPU works on this step's."""

from concurrent.futures import Future, ThreadPoolExecutor

from dist_qft.data.batches import Batches, MicroBatch


class BatchesAhead:
    """Hands out the micro-batches of `batches`, each step's made during the step before.

    Args:
        pin: put them into page-locked memory, from which a GPU copies without anybody waiting.
    """

    def __init__(self, batches: Batches, *, pin: bool) -> None:
        self._batches, self._pin = batches, pin
        self._thread = ThreadPoolExecutor(1, "batches")
        self._next: tuple[int, Future[list[MicroBatch]]] | None = None

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """As `Batches.micro_batches`; an error that the thread met is raised here."""
        made = self._next
        found = made[1].result() if made is not None and made[0] == step else self._make(step)
        following = step + 1
        self._next = None
        if following < len(self._batches):
            self._next = following, self._thread.submit(self._make, following)
        return found

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _make(self, step: int) -> list[MicroBatch]:
        batches = self._batches.micro_batches(step)
        return [batch.pinned() for batch in batches] if self._pin else batches
