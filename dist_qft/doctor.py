"""`dist-qft doctor`: what this machine has for a run, what is missing, and what to do about it.

Nothing is downloaded, no other machine is asked. A finding is `ok`, a `note` (some runs need it, this may do without)
or `missing` (no run, or not the run of the given config, can start).
"""

import importlib
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import psutil
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from dist_qft.config.schema import RunConfig
from dist_qft.errors import SetupError
from dist_qft.storage.atomic import nearest_existing

Status = Literal["ok", "note", "missing"]

_GIB = 2**30
_OLDEST_PYTHON = (3, 11)
# Packages that every run imports, and those of some runs with the extra that installs them.
_PACKAGES = ("torch", "transformers", "accelerate", "bitsandbytes", "datasets", "tensorboard", "gguf", "safetensors")
_EXTRAS = {
    "deepspeed": ("deepspeed", "sharding.engine: zero, launch/deepspeed.sh"),
    "mpi4py": ("mpi", "launch/mpirun.sh"),
    "matplotlib": ("study", "dist-qft study"),
    "peft": ("bench", "dist-qft bench"),
}
_LAUNCHERS = {"torchrun": "launch/torchrun.sh", "mpirun": "launch/mpirun.sh", "sbatch": "slurm/train.sbatch"}
_ENOUGH_FREE = 5 * _GIB
_INFINIBAND = Path("/sys/class/infiniband")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: its state in words, and what to do if it is not `ok`."""

    what: str
    status: Status
    found: str
    remedy: str = ""


def examine(config: RunConfig | None = None) -> list[Finding]:
    """All findings about this machine; with a config, also whether this run may start here."""
    findings = [*_python(), *_packages(config), *_torch(config), *_network(), *_launchers(), *_machine(config)]
    return sorted(findings, key=lambda finding: finding.status == "ok")


def print_findings(findings: list[Finding]) -> None:
    """Print a table, what is missing first, and one line that sums it up."""
    columns = [Column(heading, overflow="fold") for heading in ("", "found", "what to do")]  # no path is cut
    table = Table(*columns, title="dist-qft doctor", title_justify="left", header_style="")
    colours = {"ok": "green", "note": "yellow", "missing": "red"}
    for finding in findings:
        mark = Text.assemble((f"{finding.status:7}", colours[finding.status]), f" {finding.what}")
        table.add_row(mark, finding.found, finding.remedy)
    Console(emoji=False, highlight=False, markup=False).print(table)  # paths and extras have brackets of their own
    missing = [finding.what for finding in findings if finding.status == "missing"]
    print(f"cannot start: {', '.join(missing)}" if missing else "a run can start here")


def _python() -> Iterator[Finding]:
    found = f"{platform.python_version()} in {sys.prefix}"
    if sys.version_info < _OLDEST_PYTHON:
        yield Finding("Python", "missing", found, "use Python 3.11 or newer")
    else:
        yield Finding("Python", "ok", found)


def _packages(config: RunConfig | None) -> Iterator[Finding]:
    for name in _PACKAGES:
        yield _package(name, "missing", f"pip install {name}")
    needs_zero = config is not None and config.sharding.engine == "zero"
    for name, (extra, purpose) in _EXTRAS.items():
        status: Status = "missing" if name == "deepspeed" and needs_zero else "note"
        yield _package(name, status, f"for {purpose}: pip install 'dist-qft[{extra}]'")


def _package(name: str, otherwise: Status, remedy: str) -> Finding:
    """The finding on a package: installed or not and, if its build may break it, whether it can be imported."""
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, otherwise, "not installed", remedy)
    try:
        if name in ("torch", "bitsandbytes", "transformers") and importlib.import_module(name).__file__ is None:
            raise ImportError("its files are gone")  # what an interrupted pip leaves: folders without modules
    except Exception as error:  # a shared library of another build may raise anything
        reason = " ".join(str(error).split())[:200]
        return Finding(name, otherwise, f"{found}, and cannot be imported: {reason}", f"install it again: {remedy}")
    return Finding(name, "ok", found)


def _torch(config: RunConfig | None) -> Iterator[Finding]:
    """The GPUs that PyTorch sees, or why it sees none."""
    try:
        import torch
    except Exception:  # reported as a package
        return
    wanted = config is not None and config.sharding.device == "cuda"
    build = f"PyTorch built for CUDA {torch.version.cuda}" if torch.version.cuda else "PyTorch built for CPUs"
    count = torch.cuda.device_count()
    if count:
        for index in range(count):
            gpu = torch.cuda.get_device_properties(index)
            found = f"{gpu.name}, {gpu.total_memory / _GIB:.0f} GiB, sm_{gpu.major}{gpu.minor}"
            yield Finding(f"GPU {index}", "ok", found)
    elif Path("/proc/driver/nvidia/version").exists():
        remedy = "install a CUDA build of torch" if not torch.version.cuda else "nvidia-smi shows the driver's version"
        yield Finding("GPU", "missing" if wanted else "note", f"a driver is loaded, and {build} sees no GPU", remedy)
    else:
        remedy = "the config says sharding.device: cuda" if wanted else "runs use the CPU"
        yield Finding("GPU", "missing" if wanted else "note", f"none; {build}", remedy)
    if count:
        yield _triton()
    nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    if count and not nccl:
        yield Finding("NCCL", "missing", "not in this build of PyTorch", "install a CUDA build of torch for Linux")


def _triton() -> Finding:
    from dist_qft.quant.triton_here import triton_obstacle

    obstacle = triton_obstacle()
    if obstacle is None:
        return Finding("Triton", "ok", "its kernels can be built")
    remedy = "install a C compiler (gcc) and Python's headers (python3-dev): weights are dequantized slower without"
    return Finding("Triton", "note", obstacle, remedy)


def _network() -> Iterator[Finding]:
    """The interface on which other nodes are met, and fast interconnects."""
    try:
        import torch

        # It imports PyTorch, too.
        from dist_qft.ranks.network import LOOPBACK, interface_of, own_address, require_interfaces
    except Exception:  # reported as a package
        return
    address = own_address(os.environ.get("MASTER_ADDR", "") or platform.node())
    try:
        require_interfaces(nccl=torch.cuda.is_available())
        if address == LOOPBACK:
            yield Finding("network", "note", "loopback only", "one node; several need a network interface")
        else:
            yield Finding("network", "ok", f"{interface_of(address)} ({address})")
    except SetupError as error:
        yield Finding("network", "missing", str(error), "unset it, or set it to an interface of this machine")
    rates = [rate for rate in sorted(_INFINIBAND.glob("*/ports/*/rate")) if rate.is_file()]
    if rates:
        found = ", ".join(f"{rate.parts[-4]} {rate.read_text().strip()}" for rate in rates)
        yield Finding("InfiniBand, RoCE", "ok", found)


def _launchers() -> Iterator[Finding]:
    for program, script in _LAUNCHERS.items():
        found = shutil.which(program) or (
            program == "torchrun" and shutil.which(program, path=Path(sys.executable).parent)
        )
        if found:
            yield Finding(program, "ok", str(found))
        else:
            yield Finding(program, "note", "not in PATH", f"only {script} needs it")


def _machine(config: RunConfig | None) -> Iterator[Finding]:
    """Processor, memory and disk."""
    memory = psutil.virtual_memory()
    flags = _cpu_flags()
    bf16 = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags]
    cores = psutil.cpu_count(logical=False) or os.cpu_count()
    yield Finding("CPU", "ok", f"{cores} cores, bf16: {', '.join(bf16) or 'not in hardware'}")
    yield Finding("memory", "ok", f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB free")
    folder = nearest_existing(Path(config.output_dir if config else ".").absolute())
    free = shutil.disk_usage(folder).free
    if not os.access(folder, os.W_OK):
        yield Finding("disk", "missing", f"'{folder}' cannot be written", "set output_dir to another folder")
    elif free < _ENOUGH_FREE:
        yield Finding("disk", "note", f"{free / _GIB:.1f} GiB free in '{folder}'", "checkpoints and merges need space")
    else:
        yield Finding("disk", "ok", f"{free / _GIB:.0f} GiB free in '{folder}'")
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        yield Finding("Hub", "note", "HF_HUB_OFFLINE=1", "models and data must be on this machine")


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith("flags") for flag in line.split()}
