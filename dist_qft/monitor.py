"""What a run tells the world: TensorBoard events, JSON lines, and one line or bar on rank 0's terminal.

The same numbers go to all three, so a figure seen in TensorBoard can be found in `metrics.jsonl`. Other ranks
hold a monitor that does nothing, so the training code has no `if rank == 0`.
"""

import json
import socket
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

METRICS_FILE = "metrics.jsonl"


class Monitor:
    """Sinks of one run.

    Args:
        output_dir: event files go to `runs/<date>_<host>/` below it, JSON lines to `metrics.jsonl`.
        active: False on every rank but 0: all methods do nothing.
        total_steps, first_step: for the bar.
    """

    def __init__(self, output_dir: Path, *, active: bool, total_steps: int, first_step: int = 0) -> None:
        self.active = active
        self._writer = self._lines = self._bar = None
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.log_dir = output_dir / "runs" / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{socket.gethostname()}"
        self._writer = SummaryWriter(log_dir=str(self.log_dir))
        self._lines = open(output_dir / METRICS_FILE, "a", encoding="utf-8")  # noqa: SIM115 - open for the run
        self._console = Console(file=sys.stderr, highlight=False)
        if self._console.is_terminal:
            columns = [TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}")]
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console)
            self._task = self._bar.add_task("train", total=total_steps, completed=first_step, note="")

    def start(self) -> None:
        """Begin drawing; before it, lines are printed plainly."""
        if self._bar:
            self._bar.start()

    def say(self, text: str) -> None:
        """One line for the person watching."""
        if self.active:
            self._console.print(text, markup=False, soft_wrap=True)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Record numbers under their tags at an optimizer step (1-based: steps done)."""
        if not self.active:
            return
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        self._lines.flush()

    def progress(self, step: int, total_steps: int, note: str) -> None:
        """Advance the bar, or print a plain line where there is no terminal."""
        if self._bar:
            self._bar.update(self._task, completed=step, note=note)
        else:
            self.say(f"step {step}/{total_steps}  {note}")

    def text(self, step: int, tag: str, text: str) -> None:
        """Record a piece of text, such as a generated answer."""
        if self.active:
            self._writer.add_text(tag, text, step)
            self._lines.write(json.dumps({"step": step, tag: text}) + "\n")

    def hparams(self, settings: dict[str, object], results: dict[str, float]) -> None:
        """Record the run's settings beside its results, for TensorBoard's comparison of runs."""
        if self.active:
            plain = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in settings.items()}
            self._writer.add_hparams(plain, results, run_name=".")

    def close(self) -> None:
        """Flush and close all sinks; safe to call twice."""
        if self._bar:
            self._bar.stop()
            self._bar = None
        if self._writer:
            self._writer.close()
            self._lines.close()
            self._writer = None
            self.active = False
