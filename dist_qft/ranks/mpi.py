"""The MPI that started this process, through mpi4py: the address where the ranks meet, and a barrier.

MPI is used only when its launcher is the innermost one and nobody set MASTER_ADDR; tensors never pass through it. What
is sent is bytes, since mpi4py's lower-case methods pickle.

A process that failed ends without finalizing MPI: finalizing would wait for ranks that may hang in a collective, while
launchers take such an end for a failure, clear the other ranks away and pass the exit code on.
"""

import os
import socket
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from dist_qft.errors import PeerLostError, UserError
from dist_qft.ranks.launchers import ENVIRONMENT, MPI_LAUNCHERS

if TYPE_CHECKING:
    from mpi4py import MPI

_TEXT_BYTES = 256
_POLL_SECONDS = 0.02

_world: "MPI.Intracomm | None" = None


def with_meeting_point(env: Mapping[str, str]) -> Mapping[str, str]:
    """`env`, completed from MPI if its launcher started this process: local ranks, MASTER_ADDR and MASTER_PORT.

    Collective over the ranks of the MPI job, if so.

    Raises:
        UserError: mpi4py is missing or finds no MPI library, or its library is not the launcher's.
    """
    names = next((names for names in MPI_LAUNCHERS if names.rank in env and names.world_size in env), None)
    if names is None or "MASTER_ADDR" in env or ENVIRONMENT.rank in env or env[names.world_size] == "1":
        return env
    launcher, rank_name, size_name, local_rank_name, local_size_name = names
    world = _communicator(launcher)
    if (env[rank_name], env[size_name]) != (str(world.rank), str(world.size)):
        raise UserError(
            f"two sources disagree: {rank_name}={env[rank_name]} {size_name}={env[size_name]} ({launcher}), but mpi4py"
            f" is rank {world.rank} of {world.size} in its MPI; set MPI4PY_LIBMPI to the launcher's MPI library"
        )
    from mpi4py import MPI

    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    address, port = _meeting_point(world, single_node=node.size == world.size)
    if launcher == "mpich":
        _print_processes(world)
    local = {local_rank_name: str(node.rank), local_size_name: str(node.size)}
    node.Free()
    return {**local, **env, "MASTER_ADDR": address, "MASTER_PORT": port}


def communicator() -> "MPI.Intracomm | None":
    """All ranks of the MPI job, if `with_meeting_point` used MPI."""
    return _world


def barrier(world: "MPI.Intracomm", timeout_seconds: float) -> None:
    """Wait for all ranks without using a core meanwhile.

    Raises:
        PeerLostError: they did not all come in time.
    """
    request = world.Ibarrier()
    deadline = time.monotonic() + timeout_seconds
    while not request.Test():
        if time.monotonic() > deadline:
            raise PeerLostError(f"not all ranks came to a barrier within {timeout_seconds:g} s")
        time.sleep(_POLL_SECONDS)


def finalize() -> None:
    """Leave MPI after success, if it was used. Collective."""
    global _world
    if _world is not None:
        from mpi4py import MPI

        _world = None
        MPI.Finalize()


def _communicator(launcher: str) -> "MPI.Intracomm":
    global _world
    if _world is None:
        try:
            import mpi4py

            mpi4py.rc.finalize = False
            from mpi4py import MPI
        except ImportError as error:
            raise UserError(
                f"started by {launcher}, but mpi4py cannot be imported ({error}); pip install 'dist-qft[mpi]', or set "
                "MASTER_ADDR and MASTER_PORT"
            ) from error
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"mpi4py: {reason}; set MPI4PY_LIBMPI to the path of {launcher}'s library") from error
        _world = MPI.COMM_WORLD
    return _world


def _meeting_point(world: "MPI.Intracomm", single_node: bool) -> tuple[str, str]:
    """An address and a free port of rank 0's machine, from rank 0."""
    message = bytearray(_TEXT_BYTES)
    if world.rank == 0:
        address = "127.0.0.1" if single_node else socket.gethostname()
        with socket.socket() as probe:
            probe.bind(("", 0))
            text = f"{address} {probe.getsockname()[1]}".encode()
        message[: len(text)] = text
    world.Bcast(message, root=0)
    address, port = message.rstrip(b"\0").decode().split(" ")
    return address, port


def _print_processes(world: "MPI.Intracomm") -> None:
    """Say once which process is which rank: MPICH's launcher names a lost one by its PID and kills the others."""
    own = f"rank {world.rank} = {os.getpid()}@{socket.gethostname()}".encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0")
    everyone = bytearray(world.size * _TEXT_BYTES) if world.rank == 0 else None
    world.Gather(bytearray(own), everyone, root=0)
    if everyone is not None:
        texts = [everyone[i : i + _TEXT_BYTES].rstrip(b"\0").decode() for i in range(0, len(everyone), _TEXT_BYTES)]
        sys.stdout.write(f"processes: {', '.join(texts)}\n")  # in one write: lines of several ranks must not mix
        sys.stdout.flush()
