"""The end of the command line: an error becomes one message and an exit code."""

import os
import signal
import sys
import time

from dist_qft.cli.app import app
from dist_qft.errors import DistQFTError, SetupError
from dist_qft.ranks.launchers import local_rank_text

# How long the other ranks of a node wait for local rank 0 to print an error.
FIRST_RANK_SECONDS = 10.0


def main() -> None:
    """Run the command line and exit: with a `DistQFTError`'s own code and one message, 130 on an interrupt."""
    code = 0
    try:
        app(prog_name="dist-qft")
    except DistQFTError as error:
        print_error(error)
        code = error.exit_code
    except PermissionError as error:  # of a file or folder that no key names
        if error.filename is None:
            raise
        print_error(SetupError(f"'{error.filename}': {error.strerror}"))
        code = SetupError.exit_code
    # Outside, where the error is gone: its frames hold process groups, which must not outlive the interpreter.
    sys.exit(code)


def print_error(error: DistQFTError) -> None:
    """Print an expected failure: once per node, or from each rank whose own it is (`rank_prefix` is set then).

    Only local rank 0 prints an error that all ranks have. The other ranks wait up to FIRST_RANK_SECONDS, because a
    launcher that sees one of them exit may kill rank 0 before it has printed. If no SIGTERM comes they print too.
    """
    if error.rank_prefix is None and local_rank_text() != "0":
        if error.after_signal:  # the launcher is ending the ranks already: local rank 0 has printed
            return
        signal.signal(signal.SIGTERM, lambda *_: os._exit(error.exit_code))
        time.sleep(FIRST_RANK_SECONDS)
    where = f"{error.rank_prefix}: " if error.rank_prefix else ""
    first, *rest = f"{where}{error}".splitlines()
    # One write: lines of several ranks must not mix.
    sys.stderr.write("\n       ".join([f"error: {first}", *rest]) + "\n")
