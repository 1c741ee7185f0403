"""`dist-qft VERB ...` and `python -m dist_qft VERB ...`, the command that every launcher runs on each rank."""

import os
import sys
import traceback
from typing import NoReturn

from dist_qft.ranks import process
from dist_qft.ranks.preemption import INTERRUPTED

# Verbs that save, or can simply be started again: a stop signal while they load is no failure.
_RESUMABLE = ("train", "merge", "study")


def run() -> NoReturn:
    """Run the command line as this process's only work, and exit with its code."""
    if sys.argv[1:2] == [f"--local_rank={os.environ.get('LOCAL_RANK')}"]:
        del sys.argv[1]  # of DeepSpeed's launcher, which says it in the environment as well
    process.begin(stops_early=len(sys.argv) > 1 and sys.argv[1] in _RESUMABLE)
    code = 0
    try:
        from dist_qft.cli import main

        main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BaseException:
        traceback.print_exc()
        code = 1
    process.leave(code)


if __name__ == "__main__":
    run()
