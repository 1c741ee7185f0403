"""The place of this process among the ranks, read once from the environment of the launcher that started it.

Other modules start the processes (`dist_qft.launch`, launch/*.sh) and connect them (`connection`).
"""

import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from dist_qft.errors import UserError
from dist_qft.ranks import mpi
from dist_qft.ranks.launchers import LAUNCHERS, TORCHRUN, Launcher, RankVariables

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_DEFAULT_PORT = 29500  # torch.distributed's own
_FIRST_SPECIAL_STEP = 0xFFFFFFF0  # slurm.h, SLURM_MAX_NORMAL_STEP_ID: from here on batch, interactive, extern


@dataclass(frozen=True)
class World:
    """The place of this process among all processes of the run.

    The ranks meet at `master_address`:`master_port`; the port is 0 for launcher "single", which meets nobody.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_address: str
    master_port: int
    launcher: Launcher

    @property
    def single_node(self) -> bool:
        """True if all ranks run on this machine."""
        return self.local_world_size == self.world_size

    @classmethod
    def from_environment(cls, env: Mapping[str, str] | None = None) -> "World":
        """Read the variables of torchrun, DeepSpeed, Open MPI, MPICH or Slurm; without any, a single process.

        Without `env` it is this process's own, and MPI answers the questions that its variables leave open (`mpi`).

        The innermost launcher wins. The others must agree with it, except for one that only started a daemon per
        node, which in turn started us: so mpirun uses srun.

        Raises:
            UserError: a variable is missing, not a number or out of range, or two launchers disagree.
        """
        if env is None:
            env = mpi.with_meeting_point(os.environ)
        claims = _claims(env)
        if not claims:
            return cls(0, 1, 0, 1, _LOOPBACK[0], 0, "single")
        inner = claims[0]
        claims = [claim for claim in claims if not claim.is_daemon_of(inner)]
        for claim in claims[1:]:
            if (claim.rank, claim.world_size) != (inner.rank, inner.world_size):
                raise UserError(f"two launchers disagree: {inner} but {claim}; unset the variables that are wrong")
        local_rank, local_world_size = _local_place(env, claims)
        address, port = _meeting_point(env, claims, single_node=local_world_size == inner.world_size)
        launcher = inner.variables.launcher
        return cls(inner.rank, inner.world_size, local_rank, local_world_size, address, port, launcher)


class _Claim(NamedTuple):
    """The place of this process according to one launcher; None for a number that it does not give."""

    variables: RankVariables
    rank: int
    world_size: int
    local_rank: int | None
    local_world_size: int | None

    def __str__(self) -> str:
        names = self.variables
        return f"{names.rank}={self.rank} {names.world_size}={self.world_size} ({names.launcher})"

    def is_daemon_of(self, inner: "_Claim") -> bool:
        return self.local_world_size == 1 and self.world_size < inner.world_size


def _claims(env: Mapping[str, str]) -> list[_Claim]:
    """The claims of all launchers that have set variables, the innermost first."""
    if "LOCAL_SIZE" in env and "LOCAL_WORLD_SIZE" not in env:
        env = {**env, "LOCAL_WORLD_SIZE": env["LOCAL_SIZE"]}  # DeepSpeed's name for it
    if "TORCHELASTIC_RUN_ID" in env:
        # srun or mpirun may have started the torchrun agents in any arrangement: their variables say nothing.
        return [_claim(env, TORCHRUN)]
    present = [names for names in LAUNCHERS if names.rank in env or names.world_size in env]
    return [_claim(env, names) for names in present if names.launcher != "slurm" or _in_slurm_step(env)]


def _in_slurm_step(env: Mapping[str, str]) -> bool:
    """True if srun started us; a batch script has rank variables too, but is no rank."""
    return "SLURM_STEP_ID" in env and _number(env, "SLURM_STEP_ID") < _FIRST_SPECIAL_STEP


def _claim(env: Mapping[str, str], names: RankVariables) -> _Claim:
    rank, world_size = _number(env, names.rank), _number(env, names.world_size)
    if rank >= world_size:
        raise UserError(f"{names.rank}={rank} must be less than {names.world_size}={world_size}")
    local_rank = _number(env, names.local_rank) if names.local_rank in env else None
    local_world_size = None
    if names.local_world_size in env:
        count = _slurm_tasks_here if names.launcher == "slurm" else _number
        local_world_size = count(env, names.local_world_size)
        if local_world_size > world_size:
            raise UserError(f"{names.local_world_size}={local_world_size} exceeds {names.world_size}={world_size}")
    return _Claim(names, rank, world_size, local_rank, local_world_size)


def _number(env: Mapping[str, str], name: str) -> int:
    if name not in env:
        raise UserError(f"{name} is not set, although other variables of the same launcher are")
    if not re.fullmatch("[0-9]+", env[name]):
        raise UserError(f"{name}={env[name]!r} is not a whole number, zero or more")
    return int(env[name])


def _slurm_tasks_here(env: Mapping[str, str], name: str) -> int:
    """The tasks on node SLURM_NODEID out of a list such as "4(x2),3"."""
    counts: list[int] = []
    for item in env[name].split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item)
        if match is None:
            raise UserError(f"{name}={env[name]!r} is not a list such as '4(x2),3'")
        counts += [int(match[1])] * int(match[2] or 1)
    node = _number(env, "SLURM_NODEID")
    if node >= len(counts):
        raise UserError(f"SLURM_NODEID={node} is not among the {len(counts)} nodes of {name}={env[name]}")
    return counts[node]


def _local_place(env: Mapping[str, str], claims: list[_Claim]) -> tuple[int, int]:
    """Local rank and local world size, each from the innermost launcher that states it."""
    names, rank, world_size = claims[0][:3]
    local_rank = next((claim.local_rank for claim in claims if claim.local_rank is not None), None)
    local_world_size = next((claim.local_world_size for claim in claims if claim.local_world_size is not None), None)
    if local_world_size is None and (world_size == 1 or env.get("MASTER_ADDR") in _LOOPBACK):
        local_world_size = world_size
    if local_rank is None and local_world_size == world_size:
        local_rank = rank
    if local_world_size is None or local_rank is None:
        name = names.local_world_size if local_world_size is None else names.local_rank
        raise UserError(f"{name} is not set; it is needed to tell which of the {world_size} ranks share a node")
    if local_rank >= local_world_size:
        raise UserError(
            f"{names.local_rank}={local_rank} must be less than {names.local_world_size}={local_world_size}"
        )
    return local_rank, local_world_size


def _meeting_point(env: Mapping[str, str], claims: list[_Claim], single_node: bool) -> tuple[str, int]:
    """Address and port of rank 0, which the launcher states or which every rank derives alike."""
    names, _, world_size = claims[0][:3]
    if names.rank == "RANK" and world_size > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in env:
                raise UserError(f"{name} is not set, although {names.rank} is")
    if "MASTER_ADDR" in env:
        address = env["MASTER_ADDR"]
    elif single_node:
        address = _LOOPBACK[0]
    elif any(claim.variables.launcher == "slurm" for claim in claims):
        address = _first_slurm_node(env)
    else:
        raise UserError(f"MASTER_ADDR is not set: on several nodes, ranks started by {names.launcher} need rank 0's")
    return address, _master_port(env)


def _first_slurm_node(env: Mapping[str, str]) -> str:
    """Name or address of the node with rank 0: the first of a list such as "n[03-05,9],login" is n03."""
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_LAUNCH_NODE_IPADDR")
    nodes = next((env[name] for name in names if name in env), None)
    if nodes is None:
        raise UserError(f"{names[0]} is not set, although other variables of the same launcher are")
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", first)


def _master_port(env: Mapping[str, str]) -> int:
    """MASTER_PORT, or one derived from the job's name, so that two jobs on a node keep apart."""
    if "MASTER_PORT" in env:
        port = _number(env, "MASTER_PORT")
        if not 1 <= port <= 65535:
            raise UserError(f"MASTER_PORT: got {port}, must be 1 to 65535")
        return port
    job = env.get("PMIX_NAMESPACE")  # Open MPI, and srun --mpi=pmix
    if job is None and "SLURM_JOB_ID" in env:
        job = f"{env['SLURM_JOB_ID']}.{env.get('SLURM_STEP_ID')}"
    if job is None:
        return _DEFAULT_PORT
    return 10000 + zlib.crc32(job.encode()) % 20000  # below 32768, where Linux hands out ports of its own accord
