"""The reports of a run: JSON lines, TensorBoard and other trackers, and lines or a live display for rank 0's user.

The same numbers go to all of them, so a figure seen in a tracker can be found in `metrics.jsonl`. Other ranks
hold a monitor that does nothing, so the training code has no `if rank == 0`.

A resumed run continues the records of the one before it. Records of steps after the checkpoint are dropped, since the
same steps are about to be reported again.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from rich.console import Console

from dist_qft.config.schema import RunConfig
from dist_qft.errors import SetupError
from dist_qft.trackers.fan_out import Trackers
from dist_qft.trackers.kinds import TENSORBOARD, chosen, trackers_in
from dist_qft.training.event_files import EventFiles
from dist_qft.training.live import LiveDisplay
from dist_qft.training.metrics_file import METRICS_FILE, MetricsFile


class Sink(Protocol):
    """One place where the records of a run go, besides `metrics.jsonl`."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Record numbers under their tags at an optimizer step."""

    def text(self, step: int, tag: str, text: str) -> None:
        """Record a piece of text."""

    def hparams(self, settings: dict[str, int | float | str | bool], results: dict[str, float]) -> None:
        """Record the settings and the results of a run that has come to its end."""

    def flush(self) -> None:
        """Bring everything recorded so far to its place."""

    def close(self) -> None:
        """End the records."""


class Monitor:
    """Sinks of one run.

    Args:
        config: `train.report_to` names the sinks; files go to `output_dir`.
        active: False on every rank but 0: all methods do nothing.
        total_steps: the end of the run.
        first_step: steps done already; more than 0 is a resumed run.
        metrics_bytes, metrics_digest: size and SHA-256 of `metrics.jsonl` after `first_step`; 0 and "" if unknown.

    Attributes:
        notes: lines to tell at the start, such as one on a history that is not the one that was saved.

    Raises (as all methods do but `close`):
        SetupError: the records cannot be written.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        active: bool,
        total_steps: int,
        first_step: int = 0,
        metrics_bytes: int = 0,
        metrics_digest: str = "",
    ) -> None:
        self.active = active
        self.notes: list[str] = []
        self._output_dir = Path(config.output_dir)
        self._unread = False  # nobody reads standard error any more
        self._display: LiveDisplay | None = None
        if not active:
            return
        # Answers are shown as they are: no markup, no ":smile:" turned into a picture.
        self._console = Console(file=sys.stderr, highlight=False, markup=False, emoji=False)
        # FORCE_COLOR makes a file count as a terminal, and a dumb one cannot move its cursor: both get lines.
        if self._console.is_terminal and not self._console.is_dumb_terminal and sys.stderr.isatty():
            self._display = LiveDisplay(self._console, total_steps, first_step)
        with self._recording():
            self._sinks = _sinks(config, first_step, self)
            self._metrics = MetricsFile(self._output_dir / METRICS_FILE, first_step, metrics_bytes, metrics_digest)
        self.notes += [self._metrics.fault] if self._metrics.fault else []

    def start(self) -> None:
        """Begin drawing; before it, lines are printed plainly."""
        if self._display:
            self._display.start()

    def say(self, text: str) -> None:
        """One line for the person watching; a reader who has gone, as in `... 2>&1 | head`, does not end the run."""
        if self.active and not self._unread:
            try:
                self._console.print(text, soft_wrap=True)
            except OSError:
                self._unread = True

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Record numbers under their tags at an optimizer step (1-based: steps done)."""
        if not self.active:
            return
        with self._recording():
            for sink in self._sinks:
                sink.scalars(step, values)
            self._metrics.write({"step": step, **values})
        if self._display:
            self._display.record(values)

    def progress(self, step: int, total_steps: int, note: str) -> None:
        """Advance the display, or print a plain line where there is no terminal."""
        if self._display:
            self._display.advance(step)
        else:
            self.say(f"step {step}/{total_steps}  {note}")

    def text(self, step: int, tag: str, text: str) -> None:
        """Record a piece of text, such as a generated answer."""
        if not self.active:
            return
        with self._recording():
            for sink in self._sinks:
                sink.text(step, tag, text)
            self._metrics.write({"step": step, tag: text})

    def hparams(self, settings: dict[str, object], results: dict[str, float | None]) -> None:
        """Record the run's settings beside its results, for comparisons of runs."""
        if not self.active:
            return
        plain = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in settings.items()}
        known = {tag: value for tag, value in results.items() if value is not None}
        with self._recording():
            for sink in self._sinks:
                sink.hparams(plain, known)

    def flush(self) -> tuple[int, str]:
        """Bring everything recorded so far to the disk, as a checkpoint of this step is about to be.

        Returns size and SHA-256 of `metrics.jsonl`; 0 and "" on the ranks that do not record.
        """
        if not self.active:
            return 0, ""
        with self._recording():
            for sink in self._sinks:
                sink.flush()
            self._metrics.sync()
        return self._metrics.size, self._metrics.digest

    def close(self) -> None:
        """End the display and close the files; safe to call twice, and after a failure."""
        if self._display:
            self._display.stop()
            self._display = None
        if self.active:
            # A full disk has been reported by whoever wrote; it must not hide the error that ends the run.
            with contextlib.suppress(OSError):
                self._metrics.close()
            for sink in self._sinks:
                with contextlib.suppress(OSError):
                    sink.close()
            self.active = False

    @contextlib.contextmanager
    def _recording(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SetupError(f"{self._output_dir}: cannot record metrics: {error.strerror or error}") from error


def _sinks(config: RunConfig, first_step: int, monitor: Monitor) -> list[Sink]:
    """The sinks that `train.report_to` names; those of a resumed run (`first_step` above 0) go on where they were."""
    output_dir, report_to = Path(config.output_dir), config.train.report_to
    sinks: list[Sink] = [EventFiles(output_dir, first_step)] if TENSORBOARD in chosen(report_to) else []
    if trackers := trackers_in(report_to):
        settings = config.model_dump(mode="json")
        sinks.append(Trackers(trackers, output_dir, settings, resumed=first_step > 0, say=monitor.say))
    return sinks
