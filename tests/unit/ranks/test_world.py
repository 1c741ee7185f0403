"""The world that each launcher's environment means, and the meeting of ranks that hold one.

The Slurm, Open MPI and MPICH environments are excerpts of what the real launchers set: Slurm 22.05 (two nodes), Open
MPI 4.1 and 5.0, MPICH 5.0.
"""

import os
import socket
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from dist_qft.errors import SetupError, UserError
from dist_qft.ranks.connection import connect
from dist_qft.ranks.groups import new_group
from dist_qft.ranks.world import World


def variables(text: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in text.split())


LOCAL = variables("MASTER_ADDR=127.0.0.1 MASTER_PORT=29511")
TORCHRUN = variables(
    "TORCHELASTIC_RUN_ID=b2c6 RANK=5 WORLD_SIZE=8 LOCAL_RANK=1 LOCAL_WORLD_SIZE=4"
    " MASTER_ADDR=10.0.0.7 MASTER_PORT=29400"
)
DEEPSPEED = variables(
    "RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_SIZE=2 CROSS_RANK=1 CROSS_SIZE=2 MASTER_ADDR=node1 MASTER_PORT=29500"
)
OPENMPI = variables(
    "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=2"
    " PMIX_RANK=1 PMIX_NAMESPACE=prterun-host-7563@1"
)
MPICH = variables("PMI_RANK=2 PMI_SIZE=3 MPI_LOCALRANKID=2 MPI_LOCALNRANKS=3 PMI_FD=9")
# srun -N2 -n3: the last task, alone on the second node
SLURM = variables(
    "SLURM_JOB_ID=1 SLURM_STEP_ID=0 SLURM_PROCID=2 SLURM_NTASKS=3 SLURM_LOCALID=0 SLURM_NODEID=1"
    " SLURM_STEP_TASKS_PER_NODE=2,1 SLURM_STEP_NODELIST=n[1-2] SLURM_JOB_NODELIST=n[1-2]"
    " SLURM_LAUNCH_NODE_IPADDR=10.77.0.1"
)
# srun -N1 -n2: rank 1
SLURM_ONE_NODE = SLURM | variables(
    "SLURM_PROCID=1 SLURM_NTASKS=2 SLURM_LOCALID=1 SLURM_NODEID=0 SLURM_STEP_TASKS_PER_NODE=2 SLURM_STEP_NODELIST=n1"
)
# mpiexec.hydra -n 4 in a batch job on two nodes: MPICH's srun starts one daemon on each, and those start the ranks
HYDRA_DAEMON = SLURM | variables(
    "SLURM_PROCID=0 SLURM_NTASKS=2 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_STEP_TASKS_PER_NODE=1(x2)"
)
BATCH_SCRIPT = variables(
    "SLURM_JOB_ID=2 SLURM_PROCID=0 SLURM_NTASKS=4 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_TASKS_PER_NODE=3,1"
    " SLURM_JOB_NODELIST=n[1-2]"
)


def without(env: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in env.items() if name not in names}


# environment -> rank, world size, local rank, local world size, address, launcher
WORLDS = {
    "nothing": ({}, (0, 1, 0, 1, "127.0.0.1", "single")),
    "unrelated": ({"OMP_NUM_THREADS": "4", "LOCAL_RANK": "3"}, (0, 1, 0, 1, "127.0.0.1", "single")),
    "torchrun": (TORCHRUN, (5, 8, 1, 4, "10.0.0.7", "torchrun")),
    "torchrun under srun": (TORCHRUN | SLURM, (5, 8, 1, 4, "10.0.0.7", "torchrun")),
    "torchrun under mpirun": (TORCHRUN | OPENMPI, (5, 8, 1, 4, "10.0.0.7", "torchrun")),
    "torchrun of one": (
        TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
        (0, 1, 0, 1, "10.0.0.7", "torchrun"),
    ),
    "DeepSpeed launcher": (DEEPSPEED, (3, 4, 1, 2, "node1", "environment")),
    "DeepSpeed launcher, one per node under srun": (DEEPSPEED | HYDRA_DAEMON, (3, 4, 1, 2, "node1", "environment")),
    "by hand on this machine": ({"RANK": "1", "WORLD_SIZE": "2"} | LOCAL, (1, 2, 1, 2, "127.0.0.1", "environment")),
    "by hand, a world of one": ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1, 0, 1, "127.0.0.1", "environment")),
    "by hand, what srun says": (
        SLURM | {"RANK": "2", "WORLD_SIZE": "3", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"},
        (2, 3, 0, 1, "n1", "environment"),
    ),
    "Open MPI": (OPENMPI, (1, 2, 1, 2, "127.0.0.1", "openmpi")),
    "Open MPI on two nodes": (
        OPENMPI | {"OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "MASTER_ADDR": "node1"},
        (1, 2, 0, 1, "node1", "openmpi"),
    ),
    "MPICH": (MPICH, (2, 3, 2, 3, "127.0.0.1", "mpich")),
    "MPICH through Slurm, on two nodes": (
        HYDRA_DAEMON | MPICH | {"PMI_SIZE": "4", "MASTER_ADDR": "n1"},
        (2, 4, 2, 3, "n1", "mpich"),
    ),
    "srun": (SLURM, (2, 3, 0, 1, "n1", "slurm")),
    "srun on one node": (SLURM_ONE_NODE, (1, 2, 1, 2, "127.0.0.1", "slurm")),
    "srun --mpi=pmi2": (SLURM | {"PMI_RANK": "2", "PMI_SIZE": "3"}, (2, 3, 0, 1, "n1", "mpich")),
    "srun, address exported": (SLURM | {"MASTER_ADDR": "10.0.0.1"}, (2, 3, 0, 1, "10.0.0.1", "slurm")),
    "srun, no node list": (
        without(SLURM, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"),
        (2, 3, 0, 1, "10.77.0.1", "slurm"),
    ),
    "srun, padded ranges": (
        SLURM | {"SLURM_STEP_NODELIST": "rack[2-3]n[007-012,3],login"},
        (2, 3, 0, 1, "rack2n007", "slurm"),
    ),
    "srun, plain list": (SLURM | {"SLURM_STEP_NODELIST": "gpu-a,gpu-b"}, (2, 3, 0, 1, "gpu-a", "slurm")),
    "srun, repeated counts": (
        SLURM
        | {"SLURM_PROCID": "9", "SLURM_NTASKS": "11", "SLURM_NODEID": "2", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3"},
        (9, 11, 0, 3, "n1", "slurm"),
    ),
    "batch script": (BATCH_SCRIPT, (0, 1, 0, 1, "127.0.0.1", "single")),
    "batch script, numbered step": (
        BATCH_SCRIPT | {"SLURM_STEP_ID": "4294967291"},
        (0, 1, 0, 1, "127.0.0.1", "single"),
    ),
    "interactive step": (BATCH_SCRIPT | {"SLURM_STEP_ID": "4294967290"}, (0, 1, 0, 1, "127.0.0.1", "single")),
    "Open MPI in a batch script": (BATCH_SCRIPT | OPENMPI, (1, 2, 1, 2, "127.0.0.1", "openmpi")),
}

# environment -> what the message says
FAULTS = {
    "RANK alone": ({"RANK": "0"}, "WORLD_SIZE is not set"),
    "WORLD_SIZE alone": ({"WORLD_SIZE": "2"} | LOCAL, "RANK is not set"),
    "torchrun without RANK": (without(TORCHRUN, "RANK"), "RANK is not set"),
    "torchrun without port": (without(TORCHRUN, "MASTER_PORT"), "MASTER_PORT is not set"),
    "by hand without address": ({"RANK": "1", "WORLD_SIZE": "2"}, "LOCAL_WORLD_SIZE is not set"),
    "DeepSpeed without address": (without(DEEPSPEED, "MASTER_ADDR"), "MASTER_ADDR is not set"),
    "by hand, remote, no local rank": (without(DEEPSPEED, "LOCAL_RANK"), "LOCAL_RANK is not set"),
    "not a number": ({"RANK": "one", "WORLD_SIZE": "2"} | LOCAL, "RANK='one' is not a whole number"),
    "negative": ({"RANK": "-1", "WORLD_SIZE": "2"} | LOCAL, "RANK='-1' is not a whole number"),
    "empty": ({"RANK": "", "WORLD_SIZE": "2"} | LOCAL, "RANK='' is not a whole number"),
    "rank too high": ({"RANK": "2", "WORLD_SIZE": "2"} | LOCAL, "RANK=2 must be less than WORLD_SIZE=2"),
    "no ranks": ({"RANK": "0", "WORLD_SIZE": "0"} | LOCAL, "RANK=0 must be less than WORLD_SIZE=0"),
    "local rank too high": (TORCHRUN | {"LOCAL_RANK": "4"}, "LOCAL_RANK=4 must be less than LOCAL_WORLD_SIZE=4"),
    "local world too large": (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE=9 exceeds WORLD_SIZE=8"),
    "port too high": (TORCHRUN | {"MASTER_PORT": "65536"}, "MASTER_PORT: got 65536, must be 1 to 65535"),
    "port not a number": (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT='http' is not a whole number"),
    "Open MPI without size": (without(OPENMPI, "OMPI_COMM_WORLD_SIZE"), "OMPI_COMM_WORLD_SIZE is not set"),
    "Open MPI on two nodes, no address": (
        OPENMPI | {"OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
        "MASTER_ADDR is not set: on several nodes, ranks started by openmpi",
    ),
    "PMI without local ranks": ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "MPI_LOCALNRANKS is not set"),
    "srun without size": (without(SLURM, "SLURM_NTASKS"), "SLURM_NTASKS is not set"),
    "srun without any address": (
        without(SLURM, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_LAUNCH_NODE_IPADDR"),
        "SLURM_STEP_NODELIST is not set",
    ),
    "srun, bad counts": (
        SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2;1"},
        "SLURM_STEP_TASKS_PER_NODE='2;1' is not a list",
    ),
    "srun, bad node": (SLURM | {"SLURM_NODEID": "2"}, "SLURM_NODEID=2 is not among the 2 nodes"),
    "by hand against srun": (
        SLURM_ONE_NODE | LOCAL | {"RANK": "0", "WORLD_SIZE": "2"},
        "RANK=0 WORLD_SIZE=2 (environment) but SLURM_PROCID=1 SLURM_NTASKS=2 (slurm)",
    ),
    "Open MPI against MPICH": (
        OPENMPI | MPICH,
        "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 (openmpi) but PMI_RANK=2 PMI_SIZE=3 (mpich)",
    ),
    "DeepSpeed against Open MPI": (
        DEEPSPEED | OPENMPI,
        "RANK=3 WORLD_SIZE=4 (environment) but OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 (openmpi)",
    ),
    "MPICH against a wider srun": (
        MPICH | SLURM | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"},
        "PMI_RANK=2 PMI_SIZE=3 (mpich) but SLURM_PROCID=0 SLURM_NTASKS=3 (slurm)",
    ),
}


@pytest.mark.parametrize("name", WORLDS)
def test_environment_gives_world(name: str) -> None:
    env, (rank, world_size, local_rank, local_world_size, address, launcher) = WORLDS[name]
    world = World.from_environment(env)
    assert (world.rank, world.world_size) == (rank, world_size)
    assert (world.local_rank, world.local_world_size) == (local_rank, local_world_size)
    assert (world.master_address, world.launcher) == (address, launcher)
    assert world.single_node == (world_size == local_world_size)


@pytest.mark.parametrize("name", FAULTS)
def test_environment_is_refused(name: str) -> None:
    env, message = FAULTS[name]
    with pytest.raises(UserError) as raised:
        World.from_environment(env)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert raised.value.exit_code == 2


def test_port_is_the_same_on_all_ranks_and_differs_between_jobs() -> None:
    def port(**changes: str) -> int:
        return World.from_environment(SLURM | changes).master_port

    assert port() == port(SLURM_PROCID="0", SLURM_NODEID="0")
    assert len({port(SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(step)) for job in range(5) for step in range(3)}) == 15
    assert all(10000 <= port(SLURM_JOB_ID=str(job)) < 30000 for job in range(100))
    assert port(MASTER_PORT="4242") == 4242
    mpi_ports = {World.from_environment(OPENMPI | {"PMIX_NAMESPACE": name}).master_port for name in ("job1", "job2")}
    assert len(mpi_ports) == 2
    assert World.from_environment(MPICH).master_port == 29500
    assert World.from_environment({}).master_port == 0


def test_single_process_connects_and_disconnects() -> None:
    world = World.from_environment({})
    for _ in range(2):
        with connect(world, torch.device("cpu"), timeout_seconds=20):
            value = torch.full((3,), 2.5)
            dist.all_reduce(value)
            assert value.tolist() == [2.5, 2.5, 2.5]
            options = new_group(torch.device("cpu"), 7)._get_backend(torch.device("cpu")).options
            assert options._timeout == timedelta(seconds=7)
        assert not dist.is_initialized()
    with pytest.raises(KeyError), connect(world, torch.device("cpu"), timeout_seconds=20):
        raise KeyError
    assert not dist.is_initialized()


@pytest.mark.parametrize("rank", [0, 1])
def test_no_meeting_is_one_line_and_exit_code_3(rank: int) -> None:
    """Rank 0 finds its port taken; rank 1 finds nobody listening."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        if rank == 0:
            other.listen()
        port = other.getsockname()[1]
        env = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        world = World.from_environment(env)
        with pytest.raises(SetupError) as raised, connect(world, torch.device("cpu"), timeout_seconds=1):
            pass
    message = str(raised.value)
    assert message.startswith(f"rank {rank} of 2 could not meet the others at 127.0.0.1:{port} within 1 s: ")
    assert "\n" not in message
    assert raised.value.exit_code == 3


RANK_PROGRAM = """
import torch, torch.distributed as dist
from dist_qft.ranks.connection import connect
from dist_qft.ranks.device import device_for
from dist_qft.ranks.world import World
world = World.from_environment()
with connect(world, device_for(world, "cpu"), timeout_seconds=60):
    total = torch.tensor([10.0 ** world.rank])
    dist.all_reduce(total)
print(world.launcher, world.rank, total.item())
"""


def test_two_slurm_ranks_meet() -> None:
    """With Slurm's variables alone: no address, no port."""
    environment = without(dict(os.environ), *TORCHRUN, *OPENMPI, *MPICH)
    job = {"SLURM_JOB_ID": str(os.getpid())}
    processes = []
    for rank in ("0", "1"):
        env = environment | SLURM_ONE_NODE | job | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}
        command = [sys.executable, "-c", RANK_PROGRAM]
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate(timeout=90)[0] for process in processes]
    assert outputs == ["slurm 0 11.0\n", "slurm 1 11.0\n"]
