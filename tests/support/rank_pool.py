"""Pools of real gloo processes that live for the whole test run.

All of them are forked from one process that has imported what takes seconds.

`pool.run(function, **arguments)` calls a module-level function on every rank, with the process group up, and returns
the list of results by rank. A failure on any rank fails the test with that rank's traceback, and the pool is started
anew for the next test, because its ranks may no longer agree on which collective comes next.
"""

import multiprocessing
import os
import shutil
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

TIMEOUT_SECONDS = 180
_PRELOADED = ["dist_qft.train", "tests.support.whole_runs"]


class RankPool:
    """`size` processes in one gloo group."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._pipes: list[Connection] = []
        self._processes: list[multiprocessing.Process] = []
        self._folder = ""

    def run(self, function: Callable[..., Any], **arguments: Any) -> list[Any]:
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, arguments))
        outcomes = []
        for rank, pipe in enumerate(self._pipes):
            try:
                outcomes.append(pipe.recv() if pipe.poll(TIMEOUT_SECONDS) else (False, f"rank {rank}: no answer"))
            except EOFError:
                outcomes.append((False, f"rank {rank}: died"))
        failures = [f"rank {rank}:\n{value}" for rank, (good, value) in enumerate(outcomes) if not good]
        if failures:
            self.close()
            raise AssertionError("\n".join(failures))
        return [value for _, value in outcomes]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._pipes, self._processes = [], []
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self._folder = tempfile.mkdtemp(prefix="ranks-")
        store = os.path.join(self._folder, "store")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)


def _serve(rank: int, size: int, store: str, pipe: Connection) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import warnings

    import torch
    import torch.distributed as dist

    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(**arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
