"""The parts for several GPUs; started by `benchmarks/gpu.sh --ranks N`.

First those that all ranks do in one group of processes, then those that start commands: they are no part of a group.
"""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import faults
import several_runs
import together
from parts import Figures, Options, left_over, options, print_table, recorded_parts, run_parts

from tests.support.commands import launcher_of


def main() -> int:
    """Do all parts; returns the exit code."""
    given, words = options(), [word for word in sys.argv[1:] if word != "--again"]
    if given.again:
        given.json.unlink(missing_ok=True)
    given = replace(given, again=False)
    if left_over(given, together.PARTS):
        launcher, variables = launcher_of("together", Path(__file__).parent)
        command = [*launcher, "--nproc-per-node", str(given.ranks), "--", *words]
        code = subprocess.run(command, env={**os.environ, **variables}, check=False).returncode
        never = dict.fromkeys(together.PARTS.keys() - recorded_parts(given).keys(), partial(_not_done, code))
        run_parts(given, {name: never[name] for name in together.PARTS if name in never})
    run_parts(given, {**several_runs.PARTS, **faults.PARTS})
    print_table(given)
    return int(bool(left_over(given, recorded_parts(given))))


def _not_done(code: int, asked: Options) -> Figures:
    """The part that the ranks did not come to, or in which one of them failed that does not write."""
    raise RuntimeError(f"the ranks ended before, with exit code {code}; why stands above")


if __name__ == "__main__":
    sys.exit(main())
