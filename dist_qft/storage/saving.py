"""Checkpoints written while training goes on: a copy of the small state, then a thread on rank 0.

At most one is being written. An error in the thread is raised by the next `check`, `start` or `wait`.
Not here: the content of a checkpoint and its publication (`checkpoint`).
"""

from pathlib import Path
from threading import Thread

from dist_qft.storage.checkpoint import Checkpoint, prune, write_checkpoint
from dist_qft.storage.lock import FolderLock


class Saver:
    """The writer of one run's checkpoints, on the rank that has this object.

    Args:
        keep: newest good checkpoints to keep; the best one (`TrainerState.best_step`) is kept besides.
        newest: the checkpoint that is there already.
        lock: the run's folder, which must still be ours at each write.
    """

    def __init__(self, output_dir: Path, keep: int, newest: Path | None, lock: FolderLock | None = None) -> None:
        self.newest = newest
        self._output_dir, self._keep, self._lock = output_dir, keep, lock
        self._thread: Thread | None = None
        self._failure: BaseException | None = None

    def start(self, checkpoint: Checkpoint) -> None:
        """Copy the checkpoint and return; a thread writes it, behind the checkpoint before.

        Raises:
            UserError, SetupError, CorruptFileError: the checkpoint before could not be written.
        """
        self.wait()
        copy = checkpoint.copied()
        # Not a daemon: a process that ends by an error of another kind still finishes what it was writing.
        self._thread = Thread(target=self._write, args=(copy,), name=checkpoint.path.name)
        self._thread.start()

    def check(self) -> None:
        """Raise the error that has occurred in the thread, if any."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def wait(self) -> None:
        """Wait until the last checkpoint is published; raise the error that prevented it, if any."""
        self.close()
        self.check()

    def close(self) -> None:
        """Wait for the thread. Its failure is not raised: it must not hide the error that ends the run."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, checkpoint: Checkpoint) -> None:
        try:
            if self._lock is not None:
                self._lock.require_held()
            write_checkpoint(checkpoint)
            self.newest = checkpoint.path
            prune(self._output_dir, self._keep, checkpoint.state.best_step)
        except BaseException as error:
            self._failure = error
