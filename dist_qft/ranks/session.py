"""A session: the ranks of a run are connected, and failures are reported. Every verb opens one.

A session finds this process's place and device, connects the ranks, makes sure that they were started with the same
inputs, and from then on turns a lost peer or a lack of memory into
one clear error, and an unexpected error into a crash report.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Literal, Protocol

import torch

from dist_qft.errors import PeerLostError
from dist_qft.ranks.collectives import require_same_inputs
from dist_qft.ranks.connection import connect
from dist_qft.ranks.crash import crash_report, write_report
from dist_qft.ranks.device import device_for
from dist_qft.ranks.memory import memory_reported
from dist_qft.ranks.peers import Peers, peer_loss_reported
from dist_qft.ranks.preemption import StopSignal
from dist_qft.ranks.world import World

_WRITING_SECONDS = 20.0  # less than the launcher gives ranks that lost a peer


class Settings(Protocol):
    """The part of a run's `sharding` section that a session needs."""

    @property
    def device(self) -> Literal["auto", "cpu", "cuda"]: ...

    @property
    def timeout_seconds(self) -> int: ...


def place(sharding: Settings) -> tuple[World, torch.device]:
    """This process's place among the ranks, and its device. Needs no connection; the same at every call.

    Raises:
        UserError, SetupError: see `World.from_environment` and `device_for`.
    """
    world = World.from_environment()
    return world, device_for(world, sharding.device)


@contextmanager
def session(
    sharding: Settings,
    *,
    doing: str | Callable[[], str],
    must_match: Mapping[str, str] | None = None,
    crash_dir: Path | None = None,
    stop: StopSignal | None = None,
) -> Iterator[tuple[World, torch.device]]:
    """Connect the ranks for as long as the context lasts. Collective.

    Args:
        doing: the present activity, for messages; a fixed one such as "evaluation", or a callable such as `Activity`.
        must_match: inputs that must be the same on all ranks, by name; see `require_same_inputs`.
        crash_dir: its subfolder `crash` gets the report of an unexpected error; None writes no report.
        stop: has been entered; from the connection on, it holds signals until the ranks can stop together.

    Raises:
        SetupError: the ranks did not meet.
        UserError: the ranks were started with different inputs.
        PeerLostError: a collective inside failed.
    """
    world, device = place(sharding)
    doing_now = doing if callable(doing) else lambda: doing
    with ExitStack() as stack:
        peers = stack.enter_context(connect(world, device, sharding.timeout_seconds, doing_now))
        if stop is not None:
            stop.hold()
        stack.enter_context(errors_reported(peers, crash_dir))
        if must_match is not None:
            require_same_inputs(must_match, device)
        yield world, device


def _finish_writing() -> None:
    """Wait for threads that Python itself would wait for, as for one that writes a checkpoint; not for the main one."""
    deadline = time.monotonic() + _WRITING_SECONDS
    for thread in threading.enumerate():
        if not thread.daemon and thread not in (threading.main_thread(), threading.current_thread()):
            thread.join(max(0.0, deadline - time.monotonic()))


@contextmanager
def errors_reported(peers: Peers, crash_dir: Path | None) -> Iterator[None]:
    """Context in which a lost peer or a lack of memory becomes one clear error, which leaves a crash report.

    So does an unexpected error.

    Args:
        crash_dir: its subfolder `crash` gets the report; None writes none.
    """
    report = crash_report(crash_dir, peers.rank, peers.world_size, peers.doing) if crash_dir else nullcontext()

    def end(lost: str) -> None:
        error = PeerLostError(f"{peers.doing()}: {lost}; this rank waited for it, without an error of its own")
        if crash_dir is not None:
            write_report(crash_dir, error, peers.rank, peers.world_size, peers.doing())
        sys.stderr.write(f"error: rank {peers.rank}: {error}\n")
        sys.stderr.flush()
        _finish_writing()
        os._exit(PeerLostError.exit_code)

    with report, peer_loss_reported(peers), peers.watch(end), memory_reported(peers.doing):
        yield
