"""The reports of a run: TensorBoard events, JSON lines, and one line or bar on rank 0's terminal.

The same numbers go to all three, so a figure seen in TensorBoard can be found in `metrics.jsonl`. Other ranks
hold a monitor that does nothing, so the training code has no `if rank == 0`.

A resumed run continues the records of the one before it. Records of steps after the checkpoint are dropped, since the
same steps are about to be reported again.
"""

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dist_qft.errors import SetupError
from dist_qft.training.metrics_file import METRICS_FILE, MetricsFile

EVENTS_FOLDER = "runs"


class Monitor:
    """Sinks of one run.

    Args:
        output_dir: event files go to `runs/<date>_<host>/` below it, JSON lines to `metrics.jsonl`.
        active: False on every rank but 0: all methods do nothing.
        total_steps: where the bar ends.
        first_step: steps done already; more than 0 is a resumed run.
        metrics_bytes: size of `metrics.jsonl` after `first_step`; 0 if unknown.

    Raises (as all methods do but `close`):
        SetupError: the records cannot be written.
    """

    def __init__(
        self, output_dir: Path, *, active: bool, total_steps: int, first_step: int = 0, metrics_bytes: int = 0
    ) -> None:
        self.active = active
        self._output_dir = output_dir
        self._unread = False  # nobody reads standard error any more
        self._bar = None
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter

        with self._recording():
            # Events of a killed run beyond its checkpoint are hidden by TensorBoard itself, within one folder.
            purge_step = first_step + 1 if first_step else None
            self._writer = SummaryWriter(str(_log_dir(output_dir / EVENTS_FOLDER, first_step)), purge_step=purge_step)
            self._metrics = MetricsFile(output_dir / METRICS_FILE, first_step, metrics_bytes)
        self._thread_hook, threading.excepthook = threading.excepthook, self._on_thread_error
        # Answers are shown as they are: no markup, no ":smile:" turned into a picture.
        self._console = Console(file=sys.stderr, highlight=False, markup=False, emoji=False)
        if self._console.is_terminal:
            columns = [TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}")]
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console)
            self._task = self._bar.add_task("train", total=total_steps, completed=first_step, note="")

    def start(self) -> None:
        """Begin drawing; before it, lines are printed plainly."""
        if self._bar:
            self._bar.start()

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
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, step)
            self._metrics.write({"step": step, **values})

    def progress(self, step: int, total_steps: int, note: str) -> None:
        """Advance the bar, or print a plain line where there is no terminal."""
        if self._bar:
            self._bar.update(self._task, completed=step, note=note)
        else:
            self.say(f"step {step}/{total_steps}  {note}")

    def text(self, step: int, tag: str, text: str) -> None:
        """Record a piece of text, such as a generated answer."""
        if not self.active:
            return
        with self._recording():
            self._writer.add_text(tag, text, step)
            self._metrics.write({"step": step, tag: text})

    def hparams(self, settings: dict[str, object], results: dict[str, float | None]) -> None:
        """Record the run's settings beside its results, for TensorBoard's comparison of runs."""
        if not self.active:
            return
        plain = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in settings.items()}
        known = {tag: value for tag, value in results.items() if value is not None}
        with self._recording():
            self._writer.add_hparams(plain, known, run_name=".")

    def flush(self) -> int:
        """Bring everything recorded so far to the disk, as a checkpoint of this step is about to be.

        Returns the size of `metrics.jsonl`; 0 on the ranks that do not record.
        """
        if not self.active:
            return 0
        with self._recording():
            self._writer.flush()
            self._metrics.sync()
        return self._metrics.size

    def close(self) -> None:
        """Take the bar off the terminal and close the files; safe to call twice, and after a failure."""
        if self._bar:
            self._bar.stop()
            self._bar = None
        if self.active:
            self.active = False
            threading.excepthook = self._thread_hook
            # A full disk has been reported by whoever wrote; it must not hide the error that ends the run.
            with contextlib.suppress(OSError):
                self._metrics.close()
                self._writer.close()

    def _on_thread_error(self, failure: threading.ExceptHookArgs) -> None:
        """Leave out disk errors of TensorBoard's thread: the next write gets and reports them."""
        if not (isinstance(failure.exc_value, OSError) and type(failure.thread).__name__ == "_AsyncWriterThread"):
            self._thread_hook(failure)

    @contextlib.contextmanager
    def _recording(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SetupError(f"{self._output_dir}: cannot record metrics: {error.strerror or error}") from error


def _log_dir(folder: Path, first_step: int) -> Path:
    """A new folder for a fresh run, the newest one for a resumed run: its curves go on where they were."""
    earlier = sorted(path for path in folder.glob("*") if path.is_dir())
    if first_step and earlier:
        return earlier[-1]
    return folder / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{socket.gethostname()}"
