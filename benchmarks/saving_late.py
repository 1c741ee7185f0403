"""The cost of a checkpoint late in a run: at step 1,000,000, with a million lines of metrics, against step 100.

    python benchmarks/saving_late.py [ROUNDS]

Saves of both runs alternate, so that whatever else the machine does meets both. A save is what training waits for and
what its thread does: metrics brought to the disk, checkpoint written, read back, published, old ones pruned.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from dist_qft.storage.checkpoint import Checkpoint, checkpoint_path
from dist_qft.storage.saving import Saver
from dist_qft.storage.trainer_state import TrainerState
from dist_qft.training.metrics_file import METRICS_FILE, MetricsFile

STEPS = (100, 1_000_000)
PARAMETERS = 1_000_000
RECORD = {"train/loss": 1.234567, "train/learning_rate": 1.9e-4, "train/grad_norm": 0.123456, "train/tokens": 8192}


class LateRun:
    """A run that stands at a step, with the metrics of all steps before it."""

    def __init__(self, folder: Path, step: int) -> None:
        self.step, self._folder = step, folder
        folder.mkdir()
        with open(folder / METRICS_FILE, "w") as file:
            file.writelines(json.dumps({"step": each, **RECORD}) + "\n" for each in range(1, step + 1))
        self._metrics = MetricsFile(folder / METRICS_FILE, step, (folder / METRICS_FILE).stat().st_size)
        self._saver = Saver(folder, keep=2, newest=None)
        self._values = torch.randn(PARAMETERS)

    def save(self) -> float:
        """Take a step and save; returns the seconds of the save."""
        self.step += 1
        self._metrics.write({"step": self.step, **RECORD})
        started = time.perf_counter()
        self._metrics.sync()
        state = TrainerState(run_id="late", step=self.step, last_loss=1.0, metrics_bytes=self._metrics.size)
        moments = {"exp_avg": self._values, "exp_avg_sq": self._values}
        path = checkpoint_path(self._folder, self.step)
        self._saver.start(Checkpoint(path, {"tiles": {}}, {"layer.A": self._values}, moments, state))
        self._saver.wait()
        return time.perf_counter() - started

    def bytes_of_state(self) -> int:
        return (checkpoint_path(self._folder, self.step) / "trainer_state.json").stat().st_size


def main(rounds: int) -> None:
    with TemporaryDirectory() as folder:
        runs = [LateRun(Path(folder) / str(step), step) for step in STEPS]
        for run in runs:
            run.save()
        seconds = [[run.save() for run in runs] for _ in range(rounds)]
        for run, step, taken in zip(runs, STEPS, zip(*seconds, strict=True), strict=True):
            print(f"step {step:>9,}: {statistics.median(taken):.4f} s a save, state {run.bytes_of_state()} bytes")
        ratio = statistics.median(late / early for early, late in seconds)
        print(f"{rounds} rounds, {PARAMETERS:,} parameters: a save at the later step takes {ratio:.3f} times as long")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
