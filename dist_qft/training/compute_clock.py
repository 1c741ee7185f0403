"""The time that a rank computes in a step, without waiting for its GPU to find out."""

import time

import torch


class ComputeClock:
    """Measures one span of work per step.

    On a GPU by events of the stream that computes: the buckets' reductions run on another one, and to wait for them
    would be to wait for the slowest rank.

    Attributes:
        told: seconds to tell the other ranks before this step's are known on a GPU: there the last step's.
    """

    def __init__(self, device: torch.device) -> None:
        self.told = 0.0
        self._device = device
        self._started = self._ended = 0.0
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if device.type == "cuda":
            self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def begin(self) -> None:
        """The work begins."""
        self._started = time.perf_counter()
        if self._events is not None:
            self._events[0].record(torch.cuda.current_stream(self._device))

    def end(self) -> None:
        """The work is done, or launched."""
        self._ended = time.perf_counter()
        if self._events is None:
            self.told = self._ended - self._started
        else:
            self._events[1].record(torch.cuda.current_stream(self._device))

    def seconds(self) -> float:
        """Seconds of the step's work. To be asked once the GPU has been read for another reason."""
        if self._events is None:
            return self.told
        self._events[1].synchronize()
        self.told = self._events[0].elapsed_time(self._events[1]) / 1000
        return self.told
