"""A stop signal that comes while a process is on its way out, in a process of its own."""

import signal
import subprocess
import sys

import pytest

LEAVES_BY = """
import os, signal
from dist_qft.cli.entry import print_error
from dist_qft.errors import DistQFTError, PeerLostError, Preempted, UserError
from dist_qft.ranks.preemption import StopSignal, leave_on_stop_signals

leave_on_stop_signals()
try:
    with StopSignal() as stop:
        stop.hold()
        raise {error}("why")
except DistQFTError as error:
    os.kill(os.getpid(), signal.SIGTERM)
    print_error(error)
    raise SystemExit(error.exit_code)
"""


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        ("PeerLostError", 4, "error: why\n"),
        ("Preempted", 75, "error: why\n"),
        ("UserError", -signal.SIGTERM, ""),  # nobody ends this one because of another
    ],
)
def test_a_launchers_signal_does_not_silence_a_rank_that_leaves_because_of_another(error, code, says):
    program = [sys.executable, "-c", LEAVES_BY.format(error=error)]
    ended = subprocess.run(program, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (code, says)
