"""`python -m dist_qft VERB ...`, which is also what every launcher runs on each rank."""

import os
import sys
import traceback

from dist_qft.cli import main

if __name__ == "__main__":
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Python's own shutdown takes long enough for the peers to fail first and hide this rank's exit code.
    os._exit(code)
