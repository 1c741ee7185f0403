"""QST beside QLoRA on SmolLM2, two ranks, in one run: a measurement, not a test.

    PYTHONPATH=. python benchmarks/qst_step.py [SmolLM2.gguf]

Prints for each method the median seconds of a step, what autograd keeps for the backward pass of one micro-batch, the
growth of the resident memory while training, and the bytes of base that a rank gathers per step; then the ratios.
"""

import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch
from torch import nn

from dist_qft.config.schema import RunConfig
from dist_qft.ranks.preemption import StopSignal
from dist_qft.train import execute_run, gather_inputs
from dist_qft.training.training_run import TrainingRun
from tests.conftest import default_smollm2
from tests.support.rank_pool import RankPool
from tests.support.whole_runs import pool_world

ROWS, GLOBAL_BATCH, LENGTH, EPOCHS = 8, 4, 192, 4
METHODS = {
    "qlora": {"name": "qlora"},
    "qst": {"name": "qst"},
    "qst avgpool": {"name": "qst", "downsample": "avgpool"},
    "qst cached": {"name": "qst", "cache": "disk"},
    "qst avgpool cached": {"name": "qst", "downsample": "avgpool", "cache": "disk"},
}


def config_for(model: str, method: dict, folder: Path) -> RunConfig:
    """Packed rows of equal length, so that every step is as long as the others."""
    return RunConfig.model_validate(
        {
            "output_dir": str(folder / "run"),
            "model": {"path": model},
            "quantization": {"linear": "nf4"},
            "method": method,
            "data": {
                "train": {"path": "stdlib-docs", "limit": 2 * ROWS},
                "max_length": LENGTH,
                "packing": True,
                "cache_dir": str(folder / "data"),
            },
            "train": {
                "max_steps": ROWS * EPOCHS // GLOBAL_BATCH,
                "global_batch_size": GLOBAL_BATCH,
                "per_device_train_batch_size": GLOBAL_BATCH // 2,
                "learning_rate": 1e-3,
            },
            "sharding": {"device": "cpu"},
        }
    )


def measure(config: RunConfig) -> dict[str, float]:
    """One run on this rank."""
    torch.manual_seed(0)
    inputs = gather_inputs(config, None, pool_world(), torch.device("cpu"))
    steps: list[dict[str, float]] = []
    original = TrainingRun.run_step

    def step(run: TrainingRun):
        gathered, started = run.parts.engine.traffic.gathered_bytes, time.perf_counter()
        trainables = run.flat.values.untyped_storage().data_ptr()
        kept: dict[int, int] = {}  # bytes by storage; all are alive at once, a step being one micro-batch

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if not isinstance(tensor, nn.Parameter) and storage.data_ptr() != trainables:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), PeakMemory() as memory:
            result = original(run)
        steps.append(
            {
                "seconds": time.perf_counter() - started,
                "kept": sum(kept.values()),
                "grown": memory.grown,
                "gathered": run.parts.engine.traffic.gathered_bytes - gathered,
            }
        )
        return result

    TrainingRun.run_step = step
    execute_run(inputs, StopSignal())
    last = steps[len(steps) // 2 :]  # warm, and past the first epoch, in which a cache is filled
    return {key: statistics.median(entry[key] for entry in last) for key in last[0]}


class PeakMemory:
    """Context that samples the growth of the resident memory."""

    def __enter__(self) -> "PeakMemory":
        self._process = psutil.Process()
        self._start = self._peak = self._process.memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self._peak = max(self._peak, self._process.memory_info().rss)

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def grown(self) -> int:
        return self._peak - self._start


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else str(default_smollm2())
    results = {}
    for name, method in METHODS.items():
        pool = RankPool(2)
        with tempfile.TemporaryDirectory() as folder:
            results[name] = pool.run(measure, config=config_for(model, method, Path(folder)))[0]
        pool.close()
    print(f"{'':20}{'s / step':>10}{'kept MiB':>10}{'grown MiB':>11}{'gathered MiB':>14}")
    for name, found in results.items():
        sizes = [found[key] / 2**20 for key in ("kept", "grown", "gathered")]
        print(f"{name:20}{found['seconds']:10.2f}{sizes[0]:10.1f}{sizes[1]:11.1f}{sizes[2]:14.1f}")
    for name in list(results)[1:]:
        ratios = {key: results["qlora"][key] / max(results[name][key], 1e-9) for key in ("seconds", "kept", "gathered")}
        print(f"qlora / {name}: " + ", ".join(f"{key} {ratio:.2f}" for key, ratio in ratios.items()))


if __name__ == "__main__":
    main()
