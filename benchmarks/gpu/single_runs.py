"""Whole runs by the commands that users give: the device's losses, results and answers beside the CPU's."""

import re
import time
from collections.abc import Callable
from functools import partial

import torch
from launches import EXACT, Place, adapter_of, last_line, losses_of, not_quick, require_like, with_runs
from parts import Figures, Options
from safetensors.torch import load_file
from steps import possible

import dist_qft
from dist_qft.storage.checkpoint import ADAPTER_MODEL, list_checkpoints
from dist_qft.storage.manifest import sha256_of

_METHODS = ("qlora", "qbara", "qalora", "qablora", "qahira", "qst")
_ANSWER = 32  # tokens
_LEFT_BYTES = 4 << 30  # of a GPU's memory for a run whose step needs about 80 GiB
_ADDRESSES = 12 << 30  # bytes of the address space of such a run on a CPU
_ENDS_WITHIN = 120.0  # seconds
_MEMORY = re.compile("out of memory")


def methods(asked: Options) -> tuple[str, ...]:
    """The methods that can be trained here, those of nf4 only with bitsandbytes; by way of trial one of them."""
    if asked.quick:
        return ("qahira",)
    return _METHODS if "qlora" in possible() else ("qalora", "qablora", "qahira")


def every_method(here: Place) -> Figures:
    """Losses and gradients of every method beside the CPU's, the base whole and in the engine that shards it."""
    engines = ("fsdp",) if here.asked.quick else ("replicated", "fsdp")
    cpu = [partial(here.trained, method, f"{method}-cpu", device="cpu") for method in methods(here.asked)]
    own = [
        partial(here.trained, method, f"{method}-{engine}", f"sharding.engine={engine}")
        for method in methods(here.asked)
        for engine in engines
    ]
    runs = here.at_once([*cpu, *own])
    found: Figures = {}
    for number, run in enumerate(runs[len(cpu) :]):
        found |= require_like(run, runs[number // len(engines)])
        values = load_file(list_checkpoints(run)[-1] / ADAPTER_MODEL).values()
        if not all(bool(value.isfinite().all()) for value in values):
            raise AssertionError(f"{run.name}: adapter values that are not finite")
    return found


def packed_and_checkpointed(here: Place) -> Figures:
    """Packed rows beside the CPU's; layers that are computed again in the backward pass give the same losses."""
    kept, again = (
        losses_of(here.trained("qahira", name, *EXACT, f"train.gradient_checkpointing={setting}"))
        for name, setting in (("exact", "false"), ("checkpointed", "true"))
    )
    if kept != again:
        raise AssertionError(f"checkpointed: losses {again}, without {kept}")
    found: Figures = {"checkpointed or not: last loss": kept[-1]}
    if here.asked.quick:
        return found
    packed = ("data.packing=true", "train.per_device_train_batch_size=1")
    runs = here.at_once(
        partial(here.trained, method, f"{method}-packed{ending}", *packed, device=device)
        for method in ("qahira", "qlora")
        if method in methods(here.asked)
        for ending, device in (("", ""), ("-cpu", "cpu"))
    )
    for rows, cpu in zip(runs[::2], runs[1::2], strict=True):
        found |= require_like(rows, cpu)
    return found


def stopped(here: Place, *, optimizers: tuple[str, ...]) -> Figures:
    """Runs that lost all after step SAVED and went on from there: the adapter is that of one that did not stop."""
    found: Figures = {}
    for optimizer in optimizers:
        name = "exact" if optimizer == "adamw" else optimizer
        changes = (*EXACT, f"train.optim={optimizer}")
        run = here.trained("qahira", name, *changes)
        other = here.gone_on("qahira", run, f"stopped-{optimizer}", *changes)
        if adapter_of(run) != adapter_of(other):
            raise AssertionError(f"{optimizer}: another adapter after a resume")
        found[optimizer] = f"the same adapter, SHA-256 {adapter_of(run)[:12]}..."
    return found


def paged(here: Place) -> Figures:
    """The same for optimizers whose moments lie in memory that CPU and GPU share."""
    if "qlora" not in possible():
        return {"skipped": "bitsandbytes is not installed"}
    if here.asked.device.type == "cpu":
        return {"skipped": "only on a GPU"}
    return stopped(here, optimizers=("paged_adamw_32bit", "paged_adamw_8bit"))


def results(here: Place) -> Figures:
    """A run merged on the device and on the CPU: the same bytes; loading it, and time per token of an answer."""
    run, found = here.trained("qahira", "exact", *EXACT), Figures()
    for kind in ("gguf",) if here.asked.quick else ("gguf", "quantized"):
        digests = here.at_once(
            partial(here.merged, run, kind, device or "device", device=device) for device in ("", "cpu")
        )
        if len(set(digests)) > 1:
            raise AssertionError(f"{kind}: other bytes than from the CPU")
        if digests[0] == sha256_of(here.model):
            raise AssertionError(f"{kind}: the base's bytes, so nothing was compared")
        found[f"merged, {kind}"] = f"the CPU's bytes, SHA-256 {digests[0][:12]}..."
    device = here.asked.device
    for name in dict.fromkeys((device.type, str(device))):
        started = time.perf_counter()
        model = dist_qft.load(run, name)
        found[f"{name}: seconds to load"] = time.perf_counter() - started
    for tokens in (1, _ANSWER):  # the first builds what is built once
        started = time.perf_counter()
        model.generate(["What does os.path.join do?"], max_new_tokens=tokens)
    found["ms per token of an answer, at most"] = (time.perf_counter() - started) / _ANSWER * 1e3
    return found


def out_of_memory(here: Place) -> Figures:
    """A step that there is no memory for: an error that says so, a crash report, and the end at once."""
    if here.asked.quick:
        return {"skipped": "with --quick a step is too small"}
    on_gpu = here.asked.device.type == "cuda"
    rows = 256 if on_gpu else 64
    changes = [f"train.global_batch_size={rows}", f"train.per_device_train_batch_size={rows}"]
    words = here.settings("qahira", "too-large", *changes, "train.gradient_checkpointing=false")
    taken = max(0, torch.cuda.mem_get_info()[0] - _LEFT_BYTES) if on_gpu else 0
    held = torch.empty(taken, dtype=torch.uint8, device=here.asked.device)
    limit = () if on_gpu else ("prlimit", f"--as={_ADDRESSES}")
    started = time.perf_counter()
    with here.started("train", *words, wrapper=limit) as command:
        ended = command.finish(_ENDS_WITHIN)
    seconds = time.perf_counter() - started
    del held
    report = here.folder / "too-large/crash/rank-0.txt"
    if ended.code != 3 or not _MEMORY.search(ended.err):
        raise AssertionError(f"exit code {ended.code}: {last_line(ended)}")
    if not report.is_file() or not _MEMORY.search(report.read_text()):
        raise AssertionError("no crash report")
    return {"exit code": ended.code, "seconds with the start": seconds, "last line": last_line(ended)}


PARTS: dict[str, Callable[[Options], Figures]] = {
    "runs of every method": with_runs(every_method),
    "packed rows, checkpointed layers": with_runs(packed_and_checkpointed),
    "a run that was stopped": with_runs(partial(stopped, optimizers=("adamw",))),
    "paged optimizers of a run that was stopped": with_runs(not_quick(paged)),
    "merged results and answers": with_runs(results),
    "a step that memory is too small for": with_runs(out_of_memory),
}
