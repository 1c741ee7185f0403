"""TensorBoard's event files of a run."""

import socket
import threading
import time
from pathlib import Path

EVENTS_FOLDER = "runs"


class EventFiles:
    """Event files in `runs/<date>_<host>/` of a run's folder. A resumed run goes on in the newest folder.

    Methods raise OSError.
    """

    def __init__(self, output_dir: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Events of a killed run beyond its checkpoint are hidden by TensorBoard itself, within one folder.
        purge_step = first_step + 1 if first_step else None
        self._writer = SummaryWriter(str(_log_dir(output_dir / EVENTS_FOLDER, first_step)), purge_step=purge_step)
        self._thread_hook, threading.excepthook = threading.excepthook, self._on_thread_error

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Record numbers under their tags at an optimizer step."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def text(self, step: int, tag: str, text: str) -> None:
        """Record a piece of text."""
        self._writer.add_text(tag, text, step)

    def hparams(self, settings: dict[str, int | float | str | bool], results: dict[str, float]) -> None:
        """Record settings beside results, for TensorBoard's comparison of runs."""
        self._writer.add_hparams(settings, results, run_name=".")

    def flush(self) -> None:
        """Bring the events to the disk."""
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        threading.excepthook = self._thread_hook
        self._writer.close()

    def _on_thread_error(self, failure: threading.ExceptHookArgs) -> None:
        """Leave out disk errors of TensorBoard's thread: the next write gets and reports them."""
        if not (isinstance(failure.exc_value, OSError) and type(failure.thread).__name__ == "_AsyncWriterThread"):
            self._thread_hook(failure)


def _log_dir(folder: Path, first_step: int) -> Path:
    """A new folder for a fresh run, the newest one for a resumed run: its curves go on where they were."""
    earlier = sorted(path for path in folder.glob("*") if path.is_dir())
    if first_step and earlier:
        return earlier[-1]
    return folder / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{socket.gethostname()}"
