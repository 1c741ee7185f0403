"""Signals that ask a run to stop: noticed at once, acted upon at the end of the step."""

import signal
from types import FrameType, TracebackType

from dist_qft.errors import Preempted

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """Context in which SIGTERM and SIGUSR1 only set a flag.

    A step is never interrupted: ranks agree through the step's own reduction and then save together.
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
        # A rank that leaves because another was told to stop may get its own signal late, on its way out.
        if isinstance(error, Preempted):
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
