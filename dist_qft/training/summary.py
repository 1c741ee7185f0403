"""The run in figures: the opening lines, and `summary.json` at the end."""

import json
import resource
import sys
import time
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch

from dist_qft.data.dataset import TokenDataset
from dist_qft.ranks.collectives import maximum
from dist_qft.storage.atomic import write_text
from dist_qft.storage.checkpoint import Checkpoint
from dist_qft.training.monitor import EVENTS_FOLDER
from dist_qft.training.run_inputs import SUMMARY_FILE

if TYPE_CHECKING:
    from dist_qft.training.training_run import TrainingRun


class Summary:
    """Counts while this process trains, and writes what came out. Rates are null if it ran no step."""

    def __init__(self, run: "TrainingRun") -> None:
        self.run = run
        self.started = time.perf_counter()
        self.steps = 0
        self.tokens = 0
        self.step_seconds = 0.0
        self.gathered_bytes = 0

    def opening_lines(self, checkpoint: Checkpoint | None) -> list[str]:
        """What is about to happen, in a few lines."""
        run, config = self.run, self.run.config
        accumulation = run.batches.accumulation
        lines = [
            f"base {config.model.path}: {run.engine.resident_bytes() / 2**20:.1f} MiB on this rank "
            f"({run.engine.name}, {run.world.world_size} ranks), fingerprint {run.base.fingerprint[:16]}",
            f"{config.method.name}: {run.flat.count:,} trainable parameters in {run.inputs.plan.summary()}; "
            f"one reduction of {run.flat.bytes_per_reduction:,} bytes per step",
            f"data: {_rows(run.data.train)}, {run.data.train.report['target_tokens']:,} target tokens; "
            f"{run.total_steps} steps of {config.train.global_batch_size} "
            f"= {config.train.per_device_train_batch_size} x {accumulation} x {run.world.world_size} ranks",
        ]
        if checkpoint is not None:
            lines.append(f"resuming from {checkpoint.path} at step {checkpoint.state.step}")
        return lines

    def add_step(self, tokens: int, seconds: float, gathered_bytes: int) -> None:
        """Count one step of this process."""
        self.steps += 1
        self.tokens += tokens
        self.step_seconds += seconds
        self.gathered_bytes += gathered_bytes

    def write(self) -> None:
        """Write `summary.json` (rank 0) and say where the run's files are. Collective."""
        run = self.run
        # ru_maxrss is in KiB on Linux and in bytes on macOS.
        unit = 1 if sys.platform == "darwin" else 1024
        peak_rss = maximum(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, run.device)
        peak_device = maximum(torch.cuda.max_memory_allocated() if run.device.type == "cuda" else 0, run.device)
        base_bytes = maximum(run.engine.resident_bytes(), run.device)
        if run.world.rank != 0:
            return
        summary = {
            "method": run.config.method.name,
            "engine": run.engine.name,
            "world_size": run.world.world_size,
            "steps": run.state.step,
            "base_eval_loss": run.base_eval.loss if run.base_eval else None,
            "tuned_eval_loss": run.tuned_eval.loss if run.tuned_eval else None,
            "base_eval_metrics": run.base_eval.metrics if run.base_eval else {},
            "tuned_eval_metrics": run.tuned_eval.metrics if run.tuned_eval else {},
            "eval_tokens": run.tuned_eval.tokens if run.tuned_eval else 0,
            "final_train_loss": run.state.history[-1]["loss"],
            "trainable_parameters": run.flat.count,
            "base_bytes_per_rank": int(base_bytes),
            "gather_bytes_per_step": self._per_step(self.gathered_bytes),
            "reduce_bytes_per_step": self._per_step(run.flat.reduced_bytes),
            "tokens_per_second": self.tokens / self.step_seconds if self.steps else None,
            "peak_rss_bytes": int(peak_rss),
            "peak_device_bytes": int(peak_device) if run.device.type == "cuda" else None,
            "seconds": time.perf_counter() - self.started,
            "base_fingerprint": run.base.fingerprint,
            "versions": {name: version(name) for name in ("dist-qft", "torch", "transformers", "bitsandbytes")},
        }
        path = run.output_dir / SUMMARY_FILE
        write_text(path, json.dumps(summary, indent=1) + "\n")
        run.monitor.hparams(
            {
                **run.config.method.model_dump(),
                **run.config.train.model_dump(),
                "engine": run.engine.name,
                "world_size": run.world.world_size,
            },
            {f"result/{key}": summary[key] for key in ("base_eval_loss", "tuned_eval_loss", "final_train_loss")},
        )
        run.monitor.say(f"checkpoint  {run.saver.newest}")
        run.monitor.say(f"TensorBoard tensorboard --logdir {run.output_dir / EVENTS_FOLDER}")
        run.monitor.say(f"summary     {path}")

    def _per_step(self, total: int) -> int | None:
        return total // self.steps if self.steps else None


def _rows(data: TokenDataset) -> str:
    """How many rows a data set has and, if it is packed, how many samples these hold."""
    rows = f"{len(data):,} rows"
    return rows if data.packed_length is None else f"{len(data.segment_starts):,} samples packed into {rows}"
