"""The environment variables in which launchers tell a process its rank. Everything that reads them reads this table."""

import os
from collections.abc import Mapping
from typing import Literal, NamedTuple

Launcher = Literal["torchrun", "environment", "openmpi", "mpich", "slurm", "single"]


class RankVariables(NamedTuple):
    """The names under which one launcher tells a process its place."""

    launcher: Launcher
    rank: str
    world_size: str
    local_rank: str
    local_world_size: str


# "environment" is DeepSpeed's launcher, or variables set by hand. torchrun sets the same names.
ENVIRONMENT = RankVariables("environment", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
TORCHRUN = ENVIRONMENT._replace(launcher="torchrun")
OPENMPI = RankVariables(
    "openmpi",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
)
MPICH = RankVariables("mpich", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
SLURM = RankVariables("slurm", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")

LAUNCHERS = (ENVIRONMENT, OPENMPI, MPICH, SLURM)  # innermost first: where several are set, the first one started us
MPI_LAUNCHERS = (OPENMPI, MPICH)


# Set by our own launchers to their "host:process id". The ranks end when that process ends; see process.py.
LAUNCHER = "DIST_QFT_LAUNCHER"


def in_charge_of_terminal(env: Mapping[str, str] = os.environ) -> bool:
    """True if no launcher started this process, so that it counts Ctrl-C itself.

    Launchers pass on a Ctrl-C that the ranks get from the terminal as well: to a rank, one looks like two.
    """
    return LAUNCHER not in env and not any(names.rank in env for names in LAUNCHERS)


def local_rank_text(env: Mapping[str, str] = os.environ) -> str:
    """The local rank as its launcher wrote it, unchecked; "0" if no launcher started this process."""
    return next((env[names.local_rank] for names in LAUNCHERS if names.local_rank in env), "0")
