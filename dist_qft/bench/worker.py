"""One rank of one side: `python -m dist_qft.bench.worker SIDE SETTINGS_JSON FOLDER`, with RANK and its like set.

Writes `<rank>.json`: the side's numbers, or its error. An error of a side is a result, not a failure of the benchmark.
"""

import importlib
import json
import os
import sys
import traceback
import warnings
from pathlib import Path

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


def main(side: str, settings: str, folder: str) -> None:
    """Run one side on this rank."""
    import torch
    import torch.distributed as dist

    warnings.filterwarnings("ignore")
    values = json.loads(settings)
    torch.set_num_threads(values["threads"])
    rank = os.environ["RANK"]
    if values["device"] == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    module, function = SIDES[side].split(":")
    try:
        dist.init_process_group("nccl" if values["device"] == "cuda" else "gloo")
        result = getattr(importlib.import_module(f"dist_qft.bench.{module}"), function)(values)
    except Exception as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}
    Path(folder, f"{rank}.json").write_text(json.dumps(result))
    # Peers that failed on one rank leave the others in a collective: nobody waits for an orderly end.
    sys.stdout.flush()
    os._exit(1 if "error" in result else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
