"""Each side in processes of its own: the same number of ranks, threads and settings, in a network of their own.

Where the machine allows it (`unshare`, Linux user namespaces) the ranks get their own loopback interface: its counters
then hold their bytes alone, and it can be slowed down (`tc`, token bucket). Elsewhere they share the machine's.
"""

import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dist_qft.bench.report import Side

TIMEOUT_SECONDS = 300
_LARGEST = ("seconds", "cpu_seconds", "milliseconds", "peak_bytes", "training_peak_bytes", "held_bytes", "base_bytes")


def run_side(
    name: str, side: str, settings: Mapping[str, Any], *, ranks: int = 2, link_megabits: int | None = None
) -> Side:
    """Run `side` (a key of `worker.SIDES`) on `ranks` ranks, and take times and sizes of the slowest and largest one.

    Args:
        name: the side's name in the report.
        settings: the argument of the side's function; `device` and `threads` must be in it.
        link_megabits: slow the ranks' network down to so many megabits per second, both directions together.
    """
    with tempfile.TemporaryDirectory() as folder:
        worker = [sys.executable, "-m", "dist_qft.bench.worker", side, json.dumps(dict(settings)), folder]
        error = _run([*_shell(link_megabits), *worker], settings["threads"], ranks)
        results = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    # The rank that failed first says why; the others only lost it.
    told = [result["error"] for result in results if "error" in result]
    told.sort(key=lambda text: "Connection closed by peer" in text)
    if told or error or len(results) < ranks:
        return Side(name, error=(told or [error or "a rank ended without a word"])[0])
    return Side(name, {key: _over_ranks(key, [result[key] for result in results]) for key in results[0]})


def _run(command: list[str], threads: int, ranks: int) -> str | None:
    """Run all ranks to completion. Return the cause of a failure without an error of its own; None on success."""
    env = os.environ | {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "RANKS": " ".join(map(str, range(ranks))),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": str(threads),
        "GLOO_SOCKET_IFNAME": "lo",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
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


@functools.cache
def isolated() -> bool:
    """True if ranks can have a network of their own here."""
    if not all(map(shutil.which, ("unshare", "ip"))):
        return False
    return subprocess.run([*_namespace(None), "true"], capture_output=True).returncode == 0


@functools.cache
def can_slow_down() -> bool:
    """True if that network can be slowed down."""
    if not (isolated() and shutil.which("tc")):
        return False
    return subprocess.run([*_namespace(1000), "true"], capture_output=True).returncode == 0


def common_settings(device: str, ranks: int) -> dict[str, Any]:
    """The settings every side has: the device, and as many threads per rank as there are cores for it."""
    return {"device": device, "threads": max(1, len(os.sched_getaffinity(0)) // ranks)}


def has_device(device: str) -> bool:
    """True if benchmarks can run on this device here."""
    return device == "cpu" or torch.cuda.is_available()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _shell(link_megabits: int | None) -> list[str]:
    """A command prefix that starts the command behind it once per rank, and waits for all."""
    every = 'for rank in $RANKS; do RANK=$rank LOCAL_RANK=$rank "$@" & done; wait'
    return [*_namespace(link_megabits), "sh", "-c", every, "sh"] if isolated() else ["sh", "-c", every, "sh"]


def _namespace(link_megabits: int | None) -> list[str]:
    """A command prefix that runs the command behind it in a network namespace of its own."""
    setup = "ip link set lo up"
    if link_megabits is not None:
        setup += f" && tc qdisc add dev lo root tbf rate {link_megabits}mbit burst 256kb latency 400ms"
    return ["unshare", "--map-root-user", "--net", "sh", "-c", f'{setup} && exec "$@"', "sh"]
