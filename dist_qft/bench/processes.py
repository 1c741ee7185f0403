"""Each side in processes of its own: the same number of ranks, threads and settings, in a network of their own."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dist_qft.bench.network import Network
from dist_qft.bench.report import Side

TIMEOUT_SECONDS = 300
_LARGEST = ("seconds", "cpu_seconds", "milliseconds", "peak_bytes", "training_peak_bytes", "held_bytes", "base_bytes")


def run_side(
    name: str, side: str, settings: Mapping[str, Any], *, ranks: int = 2, network: Network | None = None
) -> Side:
    """Run `side` (a key of `worker.SIDES`) on `ranks` ranks, and take times and sizes of the slowest and largest one.

    Args:
        name: the side's name in the report.
        settings: the argument of the side's function; `device` and `threads` must be in it.
        network: of the ranks; by default a loopback interface at full speed.
    """
    with tempfile.TemporaryDirectory() as folder:
        worker = [sys.executable, "-m", "dist_qft.bench.worker", side, json.dumps(dict(settings)), folder]
        error = _run(worker, network or Network(), settings["threads"], ranks)
        results = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    # The rank that failed first says why; the others only lost it.
    told = [result["error"] for result in results if "error" in result]
    told.sort(key=lambda text: "Connection closed by peer" in text)
    if told or error or len(results) < ranks:
        return Side(name, error=(told or [error or "a rank ended without a word"])[0])
    return Side(name, {key: _over_ranks(key, [result[key] for result in results]) for key in results[0]})


def _run(worker: list[str], network: Network, threads: int, ranks: int) -> str | None:
    """Run all ranks to completion. Return the cause of a failure without an error of its own; None on success."""
    env = os.environ | network.environment(ranks)
    env |= {
        "WORLD_SIZE": str(ranks),
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [*network.command(), *worker]
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, words = process.communicate(timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return f"not done after {TIMEOUT_SECONDS} s"
    return None if process.returncode == 0 else (words.strip().splitlines() or [f"exit code {process.returncode}"])[-1]


def _over_ranks(key: str, values: list[float]) -> float:
    return max(values) if key in _LARGEST else values[0]


def has_device(device: str) -> bool:
    """True if benchmarks can run on this device here."""
    return device == "cpu" or torch.cuda.is_available()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
