"""The ranks and the device that a plan is for, which need not be those of this machine."""

from dist_qft.config.schema import RunConfig
from dist_qft.errors import UserError
from dist_qft.ranks.device import planned_device


def ranks_on_each(nodes: int, world_size: int) -> int:
    """The ranks of each node; UserError if they cannot be equally many."""
    if world_size % nodes:
        raise UserError(f"--nodes: got {nodes}, must divide --world-size {world_size}")
    return world_size // nodes


def ranks_planned(world_size: int | None, nodes: int, per_node: int | None) -> int:
    """The ranks that a plan is for: those asked for, or so many on each node. UserError if the two differ."""
    if per_node is None:
        return world_size or 1
    if world_size not in (None, nodes * per_node):
        raise UserError(f"--world-size: got {world_size}, must be --nodes {nodes} x --gpus-per-node {per_node}")
    return nodes * per_node


def for_planned_device(config: RunConfig, *, on_gpus: bool, elsewhere: bool) -> RunConfig:
    """`config` as it is planned on this machine, which need not have the GPUs of the run.

    Args:
        on_gpus: `sharding.device: auto` means GPUs there.
        elsewhere: the plan may be one for another machine: a note says so if it is one for CPUs.
    """
    if config.sharding.device != "auto" or planned_device("auto").type == "cuda":
        return config
    if on_gpus:
        return config.model_copy(update={"sharding": config.sharding.model_copy(update={"device": "cuda"})})
    note = "sharding.device: auto is a CPU here, so this plan is for CPUs; sharding.device=cuda plans for GPUs"
    return config.with_notes([*config.notes, note]) if elsewhere else config
