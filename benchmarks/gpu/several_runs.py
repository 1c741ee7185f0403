"""Whole runs on several ranks by the commands that users give: the same training, whatever the number of ranks."""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from launches import EXACT, SAVED, STEPS, Place, adapter_of, losses_of, not_quick, require_like, with_runs
from parts import Figures, Options
from together import engines

from dist_qft.config.load import load_config
from dist_qft.plan import make_plan
from dist_qft.storage.manifest import sha256_of
from tests.support.tiny_gguf import save_tiny_gguf

_LAUNCH = Path(__file__).parents[2] / "launch"
_SMALL_STEPS = 300
_ONE_DEVICE = 'CUDA_VISIBLE_DEVICES=$(echo "$DEVICES" | cut -d , -f $((LOCAL_RANK + 1))) exec "$0" -m dist_qft "$@"'


def counts(here: Place) -> list[int]:
    """The numbers of ranks that are compared."""
    return sorted({1, min(2, here.asked.ranks), here.asked.ranks})


def exact_run(here: Place, ranks: int) -> Path:
    """The folder of the run whose bits must not depend on its ranks."""
    return here.trained("qahira", f"exact-{ranks}", *EXACT, ranks=ranks)


def agree(here: Place) -> Figures:
    """Losses and gradients on 1, 2 and N ranks under every engine, and the bytes of the base beside the plan's."""
    found, first = Figures(), None
    for ranks in counts(here):
        for engine in engines()[1:2] if here.asked.quick else engines():
            changes = (f"sharding.engine={engine}", *(EXACT if here.asked.quick else ()))
            name = f"exact-{ranks}" if here.asked.quick else f"{engine}-{ranks}"
            run = here.trained("qahira", name, *changes, ranks=ranks)
            first = first or run
            found |= require_like(run, first, nats=0.01, share=0.05)
            config, *words = here.settings("qahira", name, *changes)
            planned = make_plan(load_config(Path(str(config)), list(map(str, words))), ranks).gather_bytes_per_step
            gathered = json.loads((run / "summary.json").read_text())["gather_bytes_per_step"]
            found[f"{engine}, {ranks} ranks: bytes gathered in a step, planned"] = [gathered, planned]
            if gathered != planned:
                raise AssertionError(f"{engine}, {ranks} ranks: {gathered} bytes gathered in a step, planned {planned}")
    return found


def same_adapter(here: Place) -> Figures:
    """With `gradient_sum: invariant` the adapter's bytes on 1, 2 and N ranks."""
    found = {f"{ranks} ranks": adapter_of(exact_run(here, ranks)) for ranks in counts(here)}
    if not here.asked.quick:
        changes = (*EXACT, "sharding.engine=replicated")
        run = here.trained("qahira", "exact-replicated", *changes, ranks=here.asked.ranks)
        found[f"replicated, {here.asked.ranks} ranks"] = adapter_of(run)
    if len(set(found.values())) > 1:
        raise AssertionError(f"other adapters: {found}")
    return found


def resumed(here: Place) -> Figures:
    """A run on N ranks that lost all after step SAVED, and went on from there on fewer: the same adapter."""
    whole, found = exact_run(here, here.asked.ranks), Figures()
    for ranks in counts(here)[:-1]:
        other = here.gone_on("qahira", whole, f"resumed-{ranks}", *EXACT, ranks=ranks)
        if adapter_of(other) != adapter_of(whole):
            raise AssertionError(f"from step {SAVED} to {STEPS} on {ranks} ranks: another adapter")
        found[f"{here.asked.ranks}, then {ranks} ranks"] = f"the same adapter, SHA-256 {adapter_of(other)[:12]}..."
    return found


def merged(here: Place) -> Figures:
    """A merge on N ranks: the bytes of one process."""
    run, found = exact_run(here, here.asked.ranks), Figures()
    for kind in ("gguf", "quantized"):
        several, one = (here.merged(run, kind, f"by-{ranks}", ranks=ranks) for ranks in (here.asked.ranks, None))
        if several != one or one == sha256_of(here.model):
            raise AssertionError(f"{kind}: {several} on {here.asked.ranks} ranks, {one} on one")
        found[kind] = f"the same bytes, SHA-256 {one[:12]}..."
    return found


def small_steps(here: Place) -> Figures:
    """Hundreds of steps of tiny layers and many small buckets, with NCCL's and CUDA's orders of work: none hangs."""
    steps, found = _SMALL_STEPS, Figures()
    changes = [f"model.path={save_tiny_gguf(here.folder / 'small.gguf')}", "sharding.bucket_megabytes=0.05"]
    changes += [f"data.train.path={here.folder / 'data.jsonl'}", "data.max_length=64", f"train.max_steps={steps}"]
    changes += ["sharding.timeout_seconds=60", "checkpoint.save_steps=1000"]
    for order in ("1", "0"):
        for connections in ("", "1"):
            environment = {"NCCL_LAUNCH_ORDER_IMPLICIT": order}
            environment |= {"CUDA_DEVICE_MAX_CONNECTIONS": connections} if connections else {}
            name, started = f"small-{order}-{connections or 'default'}", time.perf_counter()
            run = here.trained("qalora", name, *changes, ranks=here.asked.ranks, environment=environment)
            if len(losses_of(run)) != steps:
                raise AssertionError(f"{name}: {len(losses_of(run))} steps")
            told = f"implicit order {order}, connections {connections or 'as they are'}: seconds of {steps} steps"
            found[told] = time.perf_counter() - started
    return found


def launchers(here: Place) -> Figures:
    """The other ways to start ranks, one visible device for each among them: the same adapter as by our launcher."""
    ranks, found = here.asked.ranks, Figures()
    expected = adapter_of(exact_run(here, ranks))
    missing = "zero" not in engines()
    mpirun = shutil.which(os.environ.get("MPIRUN", "mpirun"))
    outside = "SLURM_JOB_ID" not in os.environ
    torchrun = ("torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--no-python")
    train = (sys.executable, "-m", "dist_qft", "train")
    ways: dict[str, tuple[str | bool, tuple[object, ...]]] = {
        "one device": (False, (sys.executable, "-m", *torchrun, "sh", "-c", _ONE_DEVICE, sys.executable, "train")),
        "torchrun.sh": (False, ("bash", _LAUNCH / "torchrun.sh")),
        "deepspeed.sh": (missing and "deepspeed is not installed", ("bash", _LAUNCH / "deepspeed.sh")),
        "mpirun.sh": (mpirun is None and "no mpirun", ("bash", _LAUNCH / "mpirun.sh")),
        "srun": (outside and "not within a Slurm job", ("srun", f"--ntasks={ranks}", "--gpus-per-task=1", *train)),
    }
    environment = {"NPROC_PER_NODE": str(ranks), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment["DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(ranks)))
    for name, (reason, program) in ways.items():
        if reason:
            found[name] = f"skipped: {reason}"
            continue
        folder = name.replace(" ", "-")
        words = here.settings("qahira", folder, *EXACT, f"sharding.device={here.asked.device.type}")
        here.done(*words, program=program, environment=environment)
        if adapter_of(here.folder / folder) != expected:
            raise AssertionError(f"{name}: another adapter")
        found[name] = "the same adapter"
    return found


PARTS: dict[str, Callable[[Options], Figures]] = {
    "runs on 1, 2 and N ranks": with_runs(agree),
    "the same adapter on 1, 2 and N ranks": with_runs(same_adapter),
    "a checkpoint on other ranks": with_runs(resumed),
    "merged by several ranks": with_runs(not_quick(merged)),
    "hundreds of small steps": with_runs(not_quick(small_steps)),
    "launchers": with_runs(not_quick(launchers)),
}
