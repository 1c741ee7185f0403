"""The ranks of one side on one node: `python -m dist_qft.bench.worker SIDE SETTINGS_JSON FOLDER`.

The variables of the group must be set, and RANKS, the ranks of this node. Each is forked: on a CPU from this process
with its imports made, which saves seconds for every rank; on a GPU before any import, since CUDA may not have been
touched before a fork. Each writes `<rank>.json`: the side's numbers, or its error. An error of a side is a result, not
a failure of the benchmark.
"""

import importlib
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from dist_qft.ranks.process import leave

# Side -> the function that runs it on each rank, called with the settings.
SIDES = {
    "ours": "step:ours",
    "peer": "peers_step:peer",
    "load-ours": "loading:ours",
    "load-peer": "loading:peer",
    "reduce-ours": "all_reduce:ours",
    "reduce-peer": "all_reduce:peer",
    "merge-ours": "merge:ours",
    "merge-peer": "merge:peer",
}


def main(side: str, settings: str, folder: str) -> NoReturn:
    """Run one side on the ranks of this node, and end this process with the first exit code that is not 0."""
    values = json.loads(settings)
    mapped: list[tuple[int, int]] = []
    if values["device"] == "cpu":
        import torch

        from dist_qft.bench.file_pages import mapped_file_pages

        torch.set_num_threads(1)  # OpenMP's threads, once they run, do not survive a fork: a rank would wait for them
        _function_of(side)
        mapped = mapped_file_pages()
    ranks = [_fork(int(rank), lambda: _run(side, values, folder, mapped)) for rank in os.environ["RANKS"].split()]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
    os._exit(next((abs(code) for code in codes if code), 0))


def _fork(rank: int, run: Callable[[], NoReturn]) -> int:
    """Start one rank and return its process id."""
    if pid := os.fork():
        return pid
    os.environ["RANK"], os.environ["LOCAL_RANK"] = str(rank), str(rank % int(os.environ["LOCAL_WORLD_SIZE"]))
    run()


def _function_of(side: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    module, function = SIDES[side].split(":")
    return getattr(importlib.import_module(f"dist_qft.bench.{module}"), function)


def _run(side: str, values: dict[str, Any], folder: str, mapped: list[tuple[int, int]]) -> NoReturn:
    """Run one side on this rank, write its result and end the process.

    Args:
        mapped: file pages of the parent that count as this rank's own from the start.
    """
    import torch
    import torch.distributed as dist

    from dist_qft.bench.file_pages import map_file_pages

    map_file_pages(mapped)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(values["threads"])
    rank = os.environ["RANK"]
    if values["device"] == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        dist.init_process_group("nccl" if values["device"] == "cuda" else "gloo")
        result = _function_of(side)(values)
    except Exception as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}
    Path(folder, f"{rank}.json").write_text(json.dumps(result))
    # Peers that failed on one rank leave the others in a collective: nobody waits for an orderly end.
    leave(1 if "error" in result else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
