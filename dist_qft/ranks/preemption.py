"""Signals that ask a process to stop: noticed at once, acted upon where all ranks can save together.

SIGTERM, SIGUSR1 (a scheduler's warning), SIGINT (Ctrl-C) and SIGHUP (the terminal closed) mean the same here. A signal
that was ignored when the process started stays ignored, so that `nohup` and a shell's background jobs work.

Imports nothing heavy: it is in charge from a process's first moments on.
"""

import contextlib
import os
import signal
import sys
import time
from threading import Event, Thread
from types import FrameType, TracebackType
from typing import Any

from dist_qft.errors import DistQFTError, PeerLostError, Preempted
from dist_qft.ranks.launchers import in_charge_of_terminal, local_rank_text

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
INTERRUPTED = 128 + signal.SIGINT
SECOND_INTERRUPT_SECONDS = 3.0
# For ranks that were asked to stop, until they have left: a step of a large model takes minutes, and so does a save.
# Those that wait for a lost rank leave earlier, by the timeout of their collectives.
SAVE_SECONDS = 3600.0

_EARLY = "stopped by a signal before the run began; start it again"
_CLEAN_UP_SECONDS = 3.0  # for the main thread to leave by itself, before the process is ended
_NOTICE = "interrupted: this step ends, is saved, and the run exits; Ctrl-C again within 3 s ends it at once, unsaved"


def heeded(number: signal.Signals) -> bool:
    """True if a signal may be handled: False if the process was started with this signal ignored."""
    return signal.getsignal(number) != signal.SIG_IGN


def leave_before_the_run(number: int, frame: FrameType | None = None) -> None:
    """End the process at once, with `Preempted`'s exit code, or 130 on Ctrl-C; nothing has been done yet."""
    if number != signal.SIGINT and local_rank_text() == "0":
        _write_error(f"error: {_EARLY}")
    os._exit(INTERRUPTED if number == signal.SIGINT else Preempted.exit_code)


def leave_on_stop_signals() -> None:
    """Until other handlers are set, let a stop signal mean that the run has not begun: `leave_before_the_run`."""
    for number in STOP_SIGNALS:
        if heeded(number):
            signal.signal(number, leave_before_the_run)


class _StoppedEarly(BaseException):
    """The interrupt of the main thread, wherever it is; not an Exception, which libraries catch."""


class StopSignal:
    """Context that handles the stop signals of this process. Only for the main thread.

    Until `hold`, a signal leaves the context by `Preempted` (Ctrl-C: KeyboardInterrupt), since there is nothing to
    save; if the main thread is busy in C and does not leave within 3 s, the process ends. From `hold` on a signal only
    sets `requested`: a step is never interrupted, and ranks agree to stop through the step's own reduction or
    `any_rank`.
    A second Ctrl-C within 3 s then ends the process at once, unless a launcher is there to decide that.

    Errors of ours that leave the context after a signal are marked `after_signal`.

    Attributes:
        requested: a signal has come since `hold`.
        hurried: a second Ctrl-C has come. Set only if `end_at_once` is False.

    Args:
        end_at_once: end this process on a second Ctrl-C; False leaves that to a caller that has processes to end first.
    """

    def __init__(self, *, end_at_once: bool = True) -> None:
        self.requested = False
        self.hurried = False
        self._end_at_once = end_at_once
        self._holding = False
        self._interrupted = False
        self._interrupted_at = -SECOND_INTERRUPT_SECONDS
        self._before: dict[signal.Signals, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._left = Event()

    def __enter__(self) -> "StopSignal":
        numbers = [number for number in STOP_SIGNALS if heeded(number)]
        reader, writer = self._pipe = os.pipe()
        os.set_blocking(writer, False)
        # Python runs handlers in the main thread, which may be in C for long; C's handler writes to this pipe at once.
        self._wakeup_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._interrupt_early_work) for number in numbers}
        self._watcher = Thread(target=self._watch, args=(reader,), name="stop signals", daemon=True)
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        if isinstance(error, DistQFTError):
            error.after_signal = self.requested
        if isinstance(error, _StoppedEarly):
            self._holding = True  # later signals are too late to matter
            stopped = Preempted(_EARLY)
            stopped.after_signal = True
            raise stopped from None
        # A rank that leaves because another was told to stop, or is lost, may get its launcher's signal on its way out:
        # before it has said why.
        if isinstance(error, Preempted | PeerLostError):
            return
        for number, handler in self._before.items():
            over = signal.SIG_DFL if handler == leave_before_the_run else handler
            signal.signal(number, over)
        signal.set_wakeup_fd(self._wakeup_before)
        assert self._pipe is not None, "__enter__ has made it"
        reader, writer = self._pipe
        os.close(writer)  # ends the watcher
        self._watcher.join()
        os.close(reader)

    def hold(self) -> None:
        """Have signals only set `requested` from now on: the ranks are connected and stop together."""
        self._holding = True

    def any_rank(self) -> bool:
        """True if any rank was asked to stop. Collective, of one number over the default group's CPU side."""
        import torch

        from dist_qft.ranks.collectives import maximum

        return maximum(float(self.requested), torch.device("cpu")) > 0

    def _interrupt_early_work(self, number: int, frame: FrameType | None) -> None:
        """The handler in the main thread; the watcher does the rest."""
        if self._holding:
            self.requested = True
        elif not self._interrupted:
            self._interrupted = True  # once: the next one would interrupt the cleaning up
            raise KeyboardInterrupt if number == signal.SIGINT else _StoppedEarly

    def _watch(self, reader: int) -> None:
        while number := os.read(reader, 1):
            if number[0] in STOP_SIGNALS:
                self._notice(signal.Signals(number[0]))

    def _notice(self, number: signal.Signals) -> None:
        if not self._holding:
            # The main thread gets the chance to remove half-written files.
            if not self._left.wait(_CLEAN_UP_SECONDS) and not self._holding:
                leave_before_the_run(number)
            return
        self.requested = True
        if number == signal.SIGINT and in_charge_of_terminal():
            self._count_interrupt()

    def _count_interrupt(self) -> None:
        now = time.monotonic()
        if now - self._interrupted_at > SECOND_INTERRUPT_SECONDS:
            self._interrupted_at = now
            _write_error(_NOTICE)
        elif self._end_at_once:
            _write_error("interrupted twice: ended at once, nothing more is saved")
            os._exit(INTERRUPTED)
        else:
            self.hurried = True


def _write_error(text: str) -> None:
    """A line on standard error, in one write; silent if nobody can read it any more."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
