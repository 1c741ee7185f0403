"""The groups of ranks that hold one base between them.

The frozen base has no gradients, so it may be there several times at no cost in traffic: the ranks are divided into
groups of equal size, consecutive ranks in each, and every group holds a whole base. With a node's ranks as the group,
the base never crosses the network between nodes. The trainables know nothing of it: they are the same on all ranks.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from dist_qft.errors import UserError
from dist_qft.ranks.collectives import everywhere, require_same_inputs
from dist_qft.ranks.groups import new_group
from dist_qft.ranks.world import World

Setting = str | int  # `sharding.group`: "world", "node" or a number of ranks; "auto", not yet chosen, is "world"


def ranks_in_group(setting: Setting, world_size: int, ranks_per_node: int) -> int:
    """The number of ranks that hold one base between them.

    Raises:
        UserError: the ranks cannot be divided into such groups.
    """
    named = {"world": world_size, "auto": world_size, "node": ranks_per_node}
    size = named[setting] if isinstance(setting, str) else setting
    if world_size % size:
        where = f", which is {size} ranks here" if setting == "node" else ""
        raise UserError(f"sharding.group: got {setting}{where}, must divide the {world_size} ranks of the run")
    return size


def within_nodes(group_size: int, ranks_per_node: int) -> bool:
    """True if groups of so many consecutive ranks all lie within a node."""
    return ranks_per_node % group_size == 0


@dataclass(frozen=True)
class ShardGroup:
    """This rank's group.

    Attributes:
        process_group: None for the default group, which is that of all ranks.
        rank: this rank's number within it.
        size: ranks in it.
        has_rank_0: whether the run's rank 0 is in it; it is its first.
    """

    process_group: dist.ProcessGroup | None
    rank: int
    size: int
    has_rank_0: bool

    @classmethod
    def all_ranks(cls) -> "ShardGroup":
        return cls(None, dist.get_rank(), dist.get_world_size(), True)

    @classmethod
    def make(cls, setting: Setting, device: torch.device, timeout_seconds: float) -> "ShardGroup":
        """The groups of a run, of which this rank's is returned. Collective.

        Raises:
            UserError: the ranks cannot be divided so, or ranks disagree on how; on all ranks.
        """
        if setting in ("world", "auto"):
            return cls.all_ranks()
        world_size, rank = dist.get_world_size(), dist.get_rank()
        size = _agreed_size(setting, world_size, device)
        if size == world_size:
            return cls.all_ranks()
        own = None
        for first in range(0, world_size, size):  # every rank must make every group
            group = new_group(device, timeout_seconds, range(first, first + size))
            own = group if first <= rank < first + size else own
        return cls(own, rank % size, size, rank < size)


def _agreed_size(setting: Setting, world_size: int, device: torch.device) -> int:
    ranks_per_node = world_size
    if setting == "node":
        world = World.from_environment()
        ranks_per_node = world.local_world_size
        # That the ranks of a node follow each other is every launcher's default, but not the only way. True on rank 0.
        placed = world.rank // ranks_per_node * ranks_per_node + world.local_rank == world.rank
        require_same_inputs({"numbers of ranks on their node": f"{ranks_per_node}"}, device)
        require_same_inputs({"order on their node, which sharding.group: node needs": f"{placed}"}, device)
    try:
        return ranks_in_group(setting, world_size, ranks_per_node)
    except UserError as error:
        raise everywhere(error) from None
