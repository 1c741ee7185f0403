"""Commands run in a process forked from this one, which has imported everything: a tenth of a second each, not eight.

The child runs the program's own entry point. It has a group of its own, a file for its output and a bound on its time.
"""

import contextlib
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from tests.whole.breaking.attempts import Ended

WALL_SECONDS = 120.0  # generous: other programs may have the processors
CPU_SECONDS = 10
_RECURSION = sys.getrecursionlimit()  # the attacker, who nests values deeply, has more
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def warm_up() -> None:
    """Import, before the first fork, what commands import, and fill the libraries' tables."""
    import dist_qft.chat
    import dist_qft.evaluate
    import dist_qft.generate
    import dist_qft.merge.run
    import dist_qft.merge.verify
    import dist_qft.plan
    import dist_qft.train  # noqa: F401
    from dist_qft.config.load import load_config
    from dist_qft.errors import UserError
    from dist_qft.plan import make_plan
    from tests.support.tiny_model import save_tiny_model, tiny_config

    with tempfile.TemporaryDirectory(prefix="breaking-") as folder:
        model = save_tiny_model(Path(folder) / "model")
        make_plan(tiny_config(model, Path(folder) / "run"), 1)
        with contextlib.suppress(UserError):
            load_config(Path(folder) / "none.yaml", [])


def command(*words: object, prepare: Callable[[], None] | None = None, cpu_seconds: int = CPU_SECONDS) -> Ended:
    """Run `dist-qft WORDS`; `prepare` is called in the child first."""

    def run() -> None:
        sys.argv = ["dist-qft", *map(str, words)]
        from dist_qft.__main__ import run as entry

        entry()

    return forked(run, prepare, cpu_seconds)


def forked(
    function: Callable[[], None], prepare: Callable[[], None] | None = None, cpu_seconds: int = CPU_SECONDS
) -> Ended:
    """Run a function in a forked child; its code is that of `SystemExit` or 0, or 1 after another exception."""
    with tempfile.TemporaryDirectory(prefix="breaking-") as scratch:
        output = Path(scratch) / "output"
        sys.stdout.flush()
        sys.stderr.flush()
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            _be_the_child(function, prepare, output, cpu_seconds)
        code, usage = _wait(child, started + WALL_SECONDS)
        text = output.read_text(errors="replace") if output.exists() else ""
        return Ended(code, text, time.monotonic() - started, usage.ru_maxrss * 1024)


def _be_the_child(
    function: Callable[[], None], prepare: Callable[[], None] | None, output: Path, cpu_seconds: int
) -> None:
    code = 1
    try:
        os.setsid()
        sys.setrecursionlimit(_RECURSION)
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT, 0o600)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for number, source in enumerate((nothing, descriptor, descriptor)):
            os.dup2(source, number)
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode) for number, mode in enumerate("rww"))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        for name in _RANK_VARIABLES:
            os.environ.pop(name, None)
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if prepare is not None:
            prepare()
        function()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(child: int, deadline: float) -> tuple[int | None, resource.struct_rusage]:
    """The child's exit code and use of resources; code None if its time was over. Ends all of its group."""
    late = False
    while True:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            break
        if time.monotonic() > deadline:
            late = True
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(status)
    return None if late or code in (-signal.SIGXCPU, -signal.SIGKILL) else code, usage
