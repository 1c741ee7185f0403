"""How much of a step's traffic crosses the network between nodes."""

from dist_qft.sharding.shard_group import within_nodes
from dist_qft.training.fixed_tree import nodes_within


def between_nodes(
    world_size: int,
    ranks_per_node: int,
    group_size: int,
    *,
    gathered: int,
    accumulation: int,
    reduced: int,
    invariant: bool,
) -> dict[str, int]:
    """Bytes that come into each node from other nodes.

    Gathers and reductions run as rings over consecutive ranks (NCCL's and gloo's own for large tensors), which enter
    each node once. So a gather brings a node as much as it brings one rank, or nothing if the shard group lies within
    the node; and a ring all-reduce of B bytes brings it 2 (N-1)/N B. With `invariant` it is an all-to-all, in which
    every rank of the node receives its 1/N of the nodes' subtree sums, and a ring all-gather of (N-1)/N B.

    Args:
        group_size: ranks of a shard group.
        gathered: bytes that one rank receives of the base in a micro-batch.
        accumulation: micro-batches of a rank in a step.
        reduced: bytes of the gradient buffer.
    """
    several = world_size > ranks_per_node
    of_base = gathered if several and not within_nodes(group_size, ranks_per_node) else 0
    ring = reduced * (world_size - 1) // world_size
    of_gradients = 2 * ring if several else 0
    if several and invariant:
        elsewhere = range(ranks_per_node, world_size)  # seen from the first node
        sums = sum(len(nodes_within(rank * accumulation, (rank + 1) * accumulation)) for rank in elsewhere)
        of_gradients = ring + sums * ranks_per_node * reduced // world_size
    return {
        "gather_bytes_per_micro_batch": of_base,
        "gather_bytes_per_step": of_base * accumulation,
        "reduce_bytes_per_step": of_gradients,
    }
