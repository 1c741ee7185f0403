"""Checkpoints written while training goes on: a copy of the small state, then a thread on rank 0.

At most one is being written. What goes wrong in the thread is raised by the next `check`, `start` or `wait`.
Not here: what a checkpoint is and how it is published (checkpoint.py).
"""

from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

from torch import Tensor

from dist_qft.storage.checkpoint import TrainerState, prune, write_checkpoint


class Saver:
    """Writes the checkpoints of one run, on the rank that has this object.

    Args:
        keep: newest good checkpoints to keep; the best one (`TrainerState.best_step`) is kept besides.
        newest: the checkpoint that is there already.
    """

    def __init__(self, output_dir: Path, keep: int, newest: Path | None) -> None:
        self.newest = newest
        self._output_dir, self._keep = output_dir, keep
        self._thread: Thread | None = None
        self._failure: BaseException | None = None

    def start(
        self,
        *,
        adapter_config: dict[str, Any],
        trainables: dict[str, Tensor],
        optimizer: dict[str, Tensor],
        state: TrainerState,
    ) -> None:
        """Copy all this and return; it becomes `checkpoint-<step>`. Waits for the checkpoint before.

        Raises:
            SetupError, CorruptFileError: the checkpoint before could not be written.
        """
        self.wait()
        contents = {
            "adapter_config": adapter_config,
            "trainables": {name: tensor.detach().to("cpu", copy=True) for name, tensor in trainables.items()},
            "optimizer": {name: tensor.detach().to("cpu", copy=True) for name, tensor in optimizer.items()},
            "state": replace(state, history=list(state.history)),
        }
        # Not a daemon: a process that ends by an error of another kind still finishes what it was writing.
        self._thread = Thread(target=self._write, args=(contents,), name=f"checkpoint-{state.step}")
        self._thread.start()

    def check(self) -> None:
        """Raise what has gone wrong in the thread so far."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def wait(self) -> None:
        """Wait until the last checkpoint is published, and raise what went wrong."""
        self.close()
        self.check()

    def close(self) -> None:
        """Wait for the thread; its failure must not hide the error that ends the run."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, contents: dict[str, Any]) -> None:
        try:
            self.newest = write_checkpoint(self._output_dir, **contents)
            prune(self._output_dir, self._keep, contents["state"].best_step)
        except BaseException as error:
            self._failure = error
