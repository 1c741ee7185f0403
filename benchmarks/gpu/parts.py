"""The options of `benchmarks/gpu.sh`, its results on disk, and the table of them."""

import argparse
import gc
import json
import re
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Figures = dict[str, Any]
MEASURED_ON = "measured on"


@dataclass(frozen=True)
class Options:
    """The options of the command.

    Attributes:
        quick: tiny shapes, for trying the script out; its figures mean nothing.
        again: measure what is there already, too.
        parts: only the parts in whose names this is found.
    """

    device: torch.device
    quick: bool
    ranks: int
    again: bool
    json: Path
    parts: re.Pattern[str] = re.compile("")

    @property
    def measured_on(self) -> Figures:
        """The conditions of the figures: those of others are not taken for this call's."""
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        return {"device": device, "ranks": self.ranks, "quick": self.quick}


def options(local_rank: int = 0) -> Options:
    """From the command line; ends with exit code 2 if there is no such device, or if the file is of another one."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description="Correctness and speed on GPUs.")
    parser.add_argument("--ranks", type=int, default=1, help="GPUs; default 1")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: tries the script out")
    parser.add_argument("--again", action="store_true", help="do not skip what the file has already")
    parser.add_argument("--json", type=Path, help="file of the figures; default runs/gpu-<ranks>.json")
    parser.add_argument("--parts", type=_pattern, default=Options.parts, help="only parts whose names match this")
    given = parser.parse_args()
    if given.ranks < 1:
        parser.error(f"--ranks: got {given.ranks}, must be at least 1")
    if given.device == "cuda" and torch.cuda.device_count() < given.ranks:
        parser.error(f"--device: got cuda for {given.ranks} ranks, PyTorch finds {torch.cuda.device_count()} GPUs here")
    tried = f"{'-cpu' if given.device == 'cpu' else ''}{'-quick' if given.quick else ''}"
    path = given.json or Path("runs") / f"gpu-{given.ranks}{tried}.json"
    device = torch.device("cuda", local_rank) if given.device == "cuda" else torch.device("cpu")
    asked = Options(device, given.quick, given.ranks, given.again, path, given.parts)
    if path.is_file() and not given.again:
        before = json.loads(path.read_text()).get(MEASURED_ON)
        if before != asked.measured_on:
            parser.error(f"--json: got {path}, measured on {before}, must be of {asked.measured_on}; or --again")
    return asked


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"got '{text}', must be a regular expression: {error}") from None


def recorded_parts(asked: Options) -> dict[str, Figures]:
    """The figures that the file has already; of a part that failed its reason."""
    return json.loads(asked.json.read_text()) if asked.json.is_file() else {}


def left_over(asked: Options, parts: Iterable[str]) -> list[str]:
    """The parts asked for that the file lacks, or that failed."""
    recorded = recorded_parts(asked)
    return [name for name in wanted(asked, parts) if "failed" in recorded.get(name, {"failed": "never begun"})]


def wanted(asked: Options, parts: Iterable[str]) -> list[str]:
    """The parts whose names match what was asked for."""
    return [name for name in parts if asked.parts.search(name)]


def run_parts(
    asked: Options, parts: Mapping[str, Callable[[Options], Figures]], *, together: bool = False, writes: bool = True
) -> int:
    """Do every part that the file lacks; returns the exit code, 1 if a part failed.

    A part that fails is told with its reason and does not stop the others; it is done again by the next call.

    Args:
        together: all ranks run the parts, and one `writes`. A failure ends them, for the others may be waiting within
            the part for this rank.
    """
    known = {**({} if asked.again else recorded_parts(asked)), MEASURED_ON: asked.measured_on}
    failed = False
    for name in wanted(asked, parts) if asked.again else left_over(asked, parts):
        _give_memory_back(asked.device)
        started = time.perf_counter()
        try:
            known[name] = parts[name](asked)
        except Exception as error:  # whatever a part meets, the others count
            traceback.print_exc()
            known[name], failed = {"failed": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}, True
        known[name]["seconds of this part"] = round(time.perf_counter() - started, 2)
        if writes:
            asked.json.parent.mkdir(parents=True, exist_ok=True)
            unfinished = asked.json.with_suffix(".tmp")
            unfinished.write_text(json.dumps(known, indent=1) + "\n")
            unfinished.replace(asked.json)
        if together and failed:
            break
    return int(failed)


def _give_memory_back(device: torch.device) -> None:
    """Of the part before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def print_table(asked: Options) -> None:
    """Print all figures of the file, and its name."""
    for name, found in recorded_parts(asked).items():
        print(f"\n{name}")
        for key, value in found.items():
            print(f"    {key:44} {_words(value)}")
    print(f"figures: {asked.json}")


def _words(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
