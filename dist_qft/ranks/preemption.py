"""Signals that ask a run to stop: noticed at once, acted upon where all ranks can save together."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from types import FrameType, TracebackType

from dist_qft.errors import DistQFTError, Preempted

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_EARLY = "stopped by a signal before the run began; start it again"


class StopSignal:
    """Context in which SIGTERM and SIGUSR1 only set a flag. Torch is not imported before it is needed.

    A step is never interrupted: ranks agree through the step's own reduction, elsewhere through `any_rank`.

    Errors of ours that leave the context after a signal are marked `after_signal`.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, DistQFTError):
            error.after_signal = self.requested
        # A rank that leaves because another was told to stop may get its own signal late, on its way out.
        if isinstance(error, Preempted):
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def any_rank(self) -> bool:
        """Whether any rank was asked to stop. Collective, of one number over the default group's CPU side."""
        import torch

        from dist_qft.ranks.collectives import maximum

        return maximum(float(self.requested), torch.device("cpu")) > 0

    @contextmanager
    def leaving_at_once(self) -> Iterator[None]:
        """Inside, where a rank may wait for ranks that never come, a signal ends the process with `Preempted`'s code.

        Waiting in C, the main thread would see no signal: a thread reads of it from a pipe.

        Raises:
            Preempted: a signal came before.
        """
        if self.requested:
            raise Preempted(_EARLY)
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        before = signal.set_wakeup_fd(writer)
        watcher = Thread(target=_leave_on_signal, args=(reader,), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            os.close(writer)  # ends the watcher
            watcher.join()
            os.close(reader)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True


def _leave_on_signal(reader: int) -> None:
    while number := os.read(reader, 1):
        if number[0] in _SIGNALS:
            sys.stderr.write(f"error: {_EARLY}\n")
            sys.stderr.flush()
            os._exit(Preempted.exit_code)
