"""A few attempts of each kind, but for kills: those of `test_killed_run` and `faults` take the time that there is."""

import os
import subprocess
import sys
from pathlib import Path

from tests.whole.breaking.__main__ import KINDS

ROOT = Path(__file__).parents[3]


def test_a_few_attempts_of_each_kind_find_nothing():
    # In a process of its own, since it forks, and this one has threads.
    kinds = [name for name in KINDS if name != "kills"]
    words = [sys.executable, "-m", "tests.whole.breaking", "--minutes", "2", "--attempts", "3", "--only", *kinds]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.rpartition("|---|")[2].splitlines() if line.startswith("| ")]
    # Without the right to mount there are no disks.
    assert len(rows) >= len(kinds) - 1 and all(" | 0 |" in row for row in rows), done.stdout
