"""The report of a benchmark: the sides' numbers and the comparisons drawn from them, as tables and as JSON lines."""

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from dist_qft.errors import SetupError
from dist_qft.storage.home import without_home

PACKAGES = ("torch", "transformers", "bitsandbytes", "peft", "accelerate", "deepspeed", "triton")

# Metric -> (heading with its unit, divisor), in the order of the table's columns.
METRICS = {
    "tokens_per_second": ("tokens/s", 1.0),
    "seconds": ("s", 1.0),
    "cpu_seconds": ("CPU s", 1.0),
    "milliseconds": ("ms", 1.0),
    "share_of_ceiling": ("share of ceiling", 1.0),
    "gflops": ("GFLOP/s", 1.0),
    "gigabytes_per_second": ("GB/s", 1.0),
    "training_peak_bytes": ("training peak MiB", 2.0**20),
    "peak_bytes": ("peak MiB", 2.0**20),
    "held_bytes": ("held MiB", 2.0**20),
    "base_bytes": ("base MiB", 2.0**20),
    "link_bytes": ("link MB", 1e6),
    "reduced_bytes": ("gradient MB", 1e6),
    "wire_bytes": ("wire MB", 1e6),
    "counted_bytes": ("counted MB", 1e6),
    "bound_bytes": ("bound MB", 1e6),
}


@dataclass(frozen=True)
class Side:
    """One side's numbers, by the names of METRICS; or the error that it ended with."""

    name: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class Comparison:
    """One figure of ours beside a peer's and a bound; `peer` or `bound` is None where there is none."""

    what: str
    ours: float | None
    peer: float | None = None
    peer_name: str = ""
    bound: float | None = None

    @property
    def ratio(self) -> float | None:
        """Ours over the peer's, or over the bound where there is no peer."""
        other = self.bound if self.peer is None else self.peer
        return self.ours / other if self.ours is not None and other else None


@dataclass(frozen=True)
class Report:
    """The results of one benchmark. `settings` has all that a reader needs to repeat it."""

    name: str
    settings: Mapping[str, Any]
    sides: list[Side]
    comparisons: list[Comparison]
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Everything, with versions, machine and date, as JSON-able data."""
        return {
            "benchmark": self.name,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": _machine(),
            "versions": _versions(),
            "settings": dict(self.settings),
            "sides": [{"name": s.name, "metrics": dict(s.metrics), "error": s.error} for s in self.sides],
            "comparisons": [
                {"what": c.what, "ours": c.ours, "peer": c.peer, "peer_name": c.peer_name, "ratio": c.ratio}
                | {"bound": c.bound}
                for c in self.comparisons
            ],
            "notes": self.notes,
        }


def compare(
    sides: Mapping[str, Side], metric: str, ours: str, peer: str | None, bound: float | None = None
) -> Comparison:
    """The comparison of one metric of two sides, in the unit of METRICS; a side that failed has no figure."""
    heading, divisor = METRICS[metric]
    own, other = sides[ours].metrics.get(metric), sides[peer].metrics.get(metric) if peer else None
    return Comparison(
        f"{heading}, {ours}",
        None if own is None else own / divisor,
        None if other is None else other / divisor,
        peer or "",
        None if bound is None else bound / divisor,
    )


def print_report(report: Report) -> None:
    """The two tables on standard output: each side's own numbers, and ours beside the peer and the bound."""
    console = Console(width=140, highlight=False, markup=False, emoji=False)
    found = {metric for side in report.sides for metric in side.metrics}
    columns = [metric for metric in METRICS if metric in found]
    if columns:
        table = Table(title=f"{report.name}: each side", title_justify="left")
        table.add_column("side")
        for metric in columns:
            table.add_column(METRICS[metric][0], justify="right")
        for side in report.sides:
            cells = [_number(side.metrics[m] / METRICS[m][1]) if m in side.metrics else "" for m in columns]
            table.add_row(side.name, *cells)
        console.print(table)
    table = Table(title=f"{report.name}: compared", title_justify="left")
    table.add_column("what")
    for heading in ("ours", "peer", "ratio", "bound"):
        table.add_column(heading, justify="right")
    table.add_column("peer's name")
    for row in report.comparisons:
        cells = [_number(value) for value in (row.ours, row.peer, row.ratio, row.bound)]
        table.add_row(row.what, *cells, row.peer_name)
    console.print(table)
    errors = [f"{side.name} did not run: {side.error}" for side in report.sides if side.error]
    for line in [*errors, *report.notes]:
        console.print(line, soft_wrap=True)


def append_report(report: Report, path: Path) -> None:
    """Append the report as one JSON line; raises SetupError if the file cannot be written."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(without_home(report.as_json())) + "\n")
    except OSError as error:
        raise SetupError(f"--json {path}: cannot write: {error.strerror}") from error


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return {
        "cpu": next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu),
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_average": psutil.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
