"""Commands of `dist_qft` in processes of their own, on SmolLM2 or, with --quick, on a tiny model; and their runs."""

import atexit
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from parts import Figures, Options

from dist_qft.bench import models
from dist_qft.storage.checkpoint import ADAPTER_MODEL, list_checkpoints
from dist_qft.storage.manifest import sha256_of
from dist_qft.training.metrics_file import read_history
from tests.support.commands import Command, Finished
from tests.support.tiny_gguf import save_tiny_gguf
from tests.support.tiny_model import write_data

STEPS, SAVED = 5, 3  # steps of a run, and the one that it is saved after besides the last
# PyTorch's deterministic algorithms and one order of sums: the same bits each time. The rate is one that moves the
# zeros of 4-bit blocks within STEPS.
EXACT = ("sharding.gradient_sum=invariant", "train.gradient_checkpointing=false", "train.learning_rate=1.0e-2")
_CORES = 2  # of a run, where several go at once
PATIENCE = 300.0  # seconds; a command that hangs must not stop the other parts

_T = TypeVar("_T")
_CONFIGS = Path(__file__).parents[2] / "configs/smollm2"


@dataclass(frozen=True)
class Place:
    """A folder for runs, the GGUF file that they train, and what was asked for."""

    folder: Path
    model: Path
    asked: Options

    def started(
        self,
        *words: object,
        ranks: int | None = None,
        device: str = "",
        environment: Mapping[str, str] | None = None,
        wrapper: tuple[str, ...] = (),
        program: Sequence[object] | None = None,
    ) -> Command:
        """A command on so many ranks, or as one process without the launcher; on the CPU it sees no GPU."""
        given = dict(environment or {})
        if (device or self.asked.device.type) == "cpu":
            given = {"OMP_NUM_THREADS": str(min(_CORES, os.cpu_count() or 1)), **given}
            given |= {"CUDA_VISIBLE_DEVICES": "", "DIST_QFT_CPU_PRECISION": "float32"}
        setting = ("env", *(f"{name}={value}" for name, value in given.items())) if given else ()
        return Command(*words, ranks=ranks, wrapper=(*setting, *wrapper), program=program)

    def done(self, *words: object, **settings: Any) -> Finished:
        """The outcome of a command, see `started`, that must end well; RuntimeError with its last line otherwise."""
        started = time.perf_counter()
        with self.started(*words, **settings) as command:
            ended = command.finish(PATIENCE)
        told = [str(word).removeprefix("output_dir=") for word in words[:3]]
        print(f"{' '.join(told)}: {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
        if ended.code:
            raise RuntimeError(f"{' '.join(map(str, words[:2]))}: exit code {ended.code}: {last_line(ended)}")
        return ended

    def at_once(self, works: Iterable[Callable[[], _T]]) -> list[_T]:
        """The results of these; so many run at a time that each has cores of its own."""
        count = max(1, len(os.sched_getaffinity(0)) // _CORES)
        with ThreadPoolExecutor(count) as pool:
            return [each.result() for each in [pool.submit(work) for work in works]]

    def settings(self, method: str, name: str, *changes: str) -> list[object]:
        """The words that train a method of configs/smollm2 for STEPS steps into the folder `name`."""
        rows, length = (4, 64) if self.asked.quick else (8, 96)
        rows = math.lcm(rows, 2 * self.asked.ranks)
        words = [f"output_dir={self.folder / name}", f"model.path={self.model}", f"train.max_steps={STEPS}"]
        words += [f"data.cache_dir={self.folder / 'data'}", f"data.max_length={length}", "data.eval=null"]
        words += ["evaluation.eval_steps=null", "evaluation.prompts=[]", f"checkpoint.save_steps={SAVED}"]
        words += [f"train.global_batch_size={rows}", "train.per_device_train_batch_size=2"]
        if self.asked.quick:
            words.append(f"data.train.path={self.folder / 'data.jsonl'}")
        if method in ("qahira", "qablora"):
            words += ["quantization.block=[1,32]", "method.pool=32", "method.repeat=1"]  # those of the GGUF file
        return [_CONFIGS / f"{method}.yaml", *words, *changes]

    def trained(self, method: str, name: str, *changes: str, **settings: Any) -> Path:
        """The folder of a run to its end, see `started`; one that another part has made is taken as it is."""
        run = self.folder / name
        if not (run / "summary.json").is_file():
            self.done("train", *self.settings(method, name, *changes), **settings)
        return run

    def gone_on(self, method: str, run: Path, name: str, *changes: str, ranks: int | None = None) -> Path:
        """The folder of a run that lost all after step SAVED of `run`, and went on from there to its end."""
        other = self.folder / name
        shutil.copytree(run, other)
        shutil.rmtree(other / f"checkpoint-{STEPS}")
        (other / "summary.json").unlink()
        ended = self.done("train", *self.settings(method, name, *changes), "--resume", "auto", ranks=ranks)
        if f"checkpoint-{SAVED} at step {SAVED}" not in ended.err:
            raise AssertionError(f"{name}: it did not go on from step {SAVED}: {ended.err[-300:]}")
        return other

    def merged(self, run: Path, kind: str, name: str, *, ranks: int | None = None, device: str = "") -> str:
        """SHA-256 of the file of weights that a merge of the run writes, as `gguf` or `quantized`."""
        output = self.folder / (f"{name}.gguf" if kind == "gguf" else f"{name}-{kind}")
        self.done("merge", run, "--to", kind, "-o", output, ranks=ranks, device=device)
        (weights,) = [output] if kind == "gguf" else output.glob("*.safetensors")
        return sha256_of(weights)


@cache
def _place(asked: Options) -> Place | None:
    """One folder for all parts, so that a run which several of them need is made once; it goes with this process."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    path = models.cache() / models.GGUF
    write_data(Path(folder.name, "data.jsonl"))
    if asked.quick:
        path = save_tiny_gguf(Path(folder.name, "tiny.gguf"))
    return Place(Path(folder.name), path, asked) if path.is_file() else None


def with_runs(part: Callable[[Place], Figures]) -> Callable[[Options], Figures]:
    """The part as `run_parts` calls it; skipped where SmolLM2's file is not."""

    def run(asked: Options) -> Figures:
        place = _place(asked)
        if place is None:
            return {"skipped": f"no file {models.cache() / models.GGUF}; launch/get_smollm2.sh gets it"}
        return part(place)

    return run


def not_quick(part: Callable[[Place], Figures]) -> Callable[[Place], Figures]:
    """The part, left out of a trial: the test suite has the same with tiny models, or it takes long."""
    return lambda here: {"skipped": "with --quick"} if here.asked.quick else part(here)


def last_line(ended: Finished) -> str:
    """The last line of a command's messages, shortened."""
    return "".join(ended.err.strip().splitlines()[-1:])[:200]


def losses_of(run: Path) -> list[float]:
    """The loss of every step of a run."""
    return [record.loss for record in read_history(run)]


def require_like(run: Path, other: Path, nats: float = 0.02, share: float = 0.1) -> Figures:
    """The largest gaps between two runs; AssertionError unless losses and gradients' norms are as close as asked.

    The defaults are for bfloat16 beside float32.
    """
    mine, theirs = read_history(run), read_history(other)
    losses = [(a.loss, b.loss) for a, b in zip(mine, theirs, strict=True)]
    norms = [(a.grad_norm, b.grad_norm) for a, b in zip(mine, theirs, strict=True)]
    gaps = max(abs(a - b) for a, b in losses), max(abs(a - b) / b for a, b in norms)
    if not (mine and gaps[0] < nats and gaps[1] < share):
        raise AssertionError(f"{run.name} beside {other.name}: losses {losses}, norms of gradients {norms}")
    return {f"{run.name}: last loss, largest gaps of losses and norms": [mine[-1].loss, *gaps]}


def adapter_of(run: Path) -> str:
    """SHA-256 of the newest adapter of a run."""
    return sha256_of(list_checkpoints(run)[-1] / ADAPTER_MODEL)
