"""Ranks forked from the launcher, so that a node imports torch, transformers and our own package only once.

These imports take eight seconds of a core, which each rank of a node would spend again. The launcher imports what the
ranks need, forks them before it opens a store or starts torchrun, and they wait. When torchrun starts a rank, the
waiting process takes over what a new one would have been given: environment, output files, arguments. From there on it
is as `python -u -m MODULE` would be: in a session of its own, with default signal handlers, a child of the launcher.

Ranks are started afresh instead where forking is unsafe or means something else: on GPUs, since CUDA may not have been
touched before a fork; under `--numa-binding` and PYTHON_EXEC, which change the command; and on a restart, when the
launcher has threads of its own.
"""

import contextlib
import io
import json
import os
import runpy
import signal
import socket
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from typing import Any, NoReturn, TextIO, cast

import torch
from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from dist_qft.ranks.preemption import STOP_SIGNALS, heeded, leave_on_stop_signals
from dist_qft.ranks.process import leave

_POLL_SECONDS = 0.02
_READY = b"."
_MOST_BYTES = 1 << 16  # of one read


def can_fork(args: Namespace) -> bool:
    """True if the ranks of this launch may be forked. `args` are torchrun's."""
    changed = args.numa_binding is not None or "PYTHON_EXEC" in os.environ
    whole = None not in (sys.__stdin__, sys.__stdout__, sys.__stderr__)  # else a socket may get such a file's number
    return sys.platform == "linux" and torch.cuda.device_count() == 0 and whole and not changed


class WaitingRank:
    """A forked process that waits to become a rank; torchrun uses the part of `Popen` that is here."""

    def __init__(self, module: str, local_rank: int, others: Sequence["WaitingRank"]) -> None:
        self.returncode: int | None = None
        self.started = False
        self._socket, theirs = socket.socketpair()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _run_forked(module, local_rank, theirs, [self._socket, *(other._socket for other in others)])
        theirs.close()
        self._socket.recv(1)  # it leads a session of its own by now; nothing comes from one that has ended already

    def start(self, arguments: Sequence[str], env: Mapping[str, str], outputs: tuple[int, int]) -> None:
        """Have the process run the module with these arguments, this environment and these output files."""
        self.started = True
        with self._socket, contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a signal has ended it
            socket.send_fds(self._socket, [_READY], outputs)
            self._socket.sendall(json.dumps([list(arguments), dict(env)]).encode())

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while the process runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Wait for the end and return the exit code. Raises TimeoutExpired after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise TimeoutExpired("rank", timeout)
            time.sleep(_POLL_SECONDS)
        return code


class ForkedRanks:
    """The ranks of this node, forked and waiting for torchrun to start them."""

    def __init__(self, module: str, count: int) -> None:
        self._ranks: list[WaitingRank] = []
        for local_rank in range(count):
            self._ranks.append(WaitingRank(module, local_rank, self._ranks))

    def use(self) -> None:
        """Have torchrun start these processes; when it starts ranks again, it gets new ones."""
        setattr(api, "get_subprocess_handler", self._handler)  # noqa: B010 - a function, to type checkers

    @property
    def waiting(self) -> set[int]:
        """Process ids of those that are no ranks yet."""
        return {rank.pid for rank in self._ranks if not rank.started}

    def _handler(self, **options: Any) -> SubprocessHandler:
        rank = self._ranks[options["local_rank_id"]]
        return SubprocessHandler(**options) if rank.started else _ForkedHandler(rank, **options)


class _ForkedHandler(SubprocessHandler):
    """torchrun's handle of one rank, around a process that is there already."""

    def __init__(self, rank: WaitingRank, **options: Any) -> None:
        self._rank = rank
        super().__init__(**options)

    def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> Popen[bytes]:
        outputs = (file.fileno() if file else number for number, file in ((1, self._stdout), (2, self._stderr)))
        _python, _unbuffered, _m, _module, *words = args
        self._rank.start(words, env, cast(tuple[int, int], tuple(outputs)))
        return cast("Popen[bytes]", self._rank)


# --- in the forked process --------------------------------------------------------------------------------------------


def _run_forked(module: str, local_rank: int, ours: socket.socket, others: Sequence[socket.socket]) -> NoReturn:
    """Wait for the start, run `module`, and end the process with its exit code; never return."""
    code = 1
    try:
        os.setsid()
        os.environ["LOCAL_RANK"] = str(local_rank)  # only the first one prints that a signal came too early
        leave_on_stop_signals()
        for other in others:
            other.close()
        ours.send(_READY)
        words, env = _await_start(ours)
        _take_over(env)
        sys.argv = [module, *words]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as stop:
        code = _code_of(stop)
    except BaseException:
        traceback.print_exc()
    finally:
        leave(code)


def _await_start(ours: socket.socket) -> tuple[list[str], dict[str, str]]:
    """Wait for `WaitingRank.start`; the launcher may end first, and then so does this process."""
    ready, files, _, _ = socket.recv_fds(ours, 1, 2)
    if not ready:
        os._exit(0)
    for number, file in zip((1, 2), files, strict=True):
        os.dup2(file, number)
        os.close(file)
    parts = []
    while part := ours.recv(_MOST_BYTES):
        parts.append(part)
    ours.close()
    words, env = json.loads(b"".join(parts))
    return words, env


def _take_over(env: Mapping[str, str]) -> None:
    """Give this process what a new interpreter would have: environment, unbuffered streams, default signal handlers."""
    os.environ.clear()
    os.environ.update(env)
    sys.stdout, sys.stderr = _unbuffered(sys.__stdout__), _unbuffered(sys.__stderr__)
    for number in STOP_SIGNALS:
        if heeded(number):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    threads = env.get("OMP_NUM_THREADS", "").partition(",")[0]
    if threads.isdecimal() and int(threads) > 0:
        torch.set_num_threads(int(threads))  # OpenMP has read the launcher's variables
    with contextlib.suppress(OSError):  # a read-only /proc, as some containers have
        Path("/proc/self/comm").write_text(f"rank {env['RANK']}")  # for `top`: the command line is the launcher's


def _unbuffered(stream: TextIO | None) -> TextIO:
    """A stream to the same file, without a buffer."""
    assert stream is not None, "can_fork has seen to it"
    raw = cast(Any, io.FileIO(stream.fileno(), "w", closefd=False))
    return io.TextIOWrapper(raw, encoding=stream.encoding, errors=stream.errors, write_through=True)


def _code_of(stop: SystemExit) -> int:
    if stop.code is None or isinstance(stop.code, int):
        return stop.code or 0
    print(stop.code, file=sys.stderr)
    return 1
