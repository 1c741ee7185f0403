"""The parts for several GPUs; started by `benchmarks/gpu.sh --ranks N`.

First those that all ranks do in one group of processes, then those that start commands: they are no part of a group.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import faults
import several_runs
import together
from parts import known_parts, options, print_table, run_parts

_LAUNCHER = "import sys; from dist_qft.launch.command import main; sys.exit(main(module='together'))"
_PATHS = f"{Path(__file__).parent}:{Path(__file__).parents[2]}"


def main() -> int:
    """Do all parts; returns the exit code."""
    given, words = options(), [word for word in sys.argv[1:] if word != "--again"]
    if given.again:
        given.json.unlink(missing_ok=True)
    code = 0
    if together.PARTS.keys() - known_parts(given).keys():
        launcher = [sys.executable, "-c", _LAUNCHER, "--nproc-per-node", str(given.ranks), "--", *words]
        code = subprocess.run(launcher, env={**os.environ, "PYTHONPATH": _PATHS}, check=False).returncode
    code = run_parts(replace(given, again=False), {**several_runs.PARTS, **faults.PARTS}) or code
    print_table(given)
    return int(bool(code))


if __name__ == "__main__":
    sys.exit(main())
