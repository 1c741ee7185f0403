"""The part of a step's traffic that crosses the network between nodes."""

from dataclasses import dataclass

from dist_qft.sharding.shard_group import within_nodes
from dist_qft.training.fixed_tree import nodes_within


@dataclass(frozen=True)
class Placement:
    """The place of a run's ranks: consecutive ones share a node, and consecutive ones share a base."""

    world_size: int
    ranks_per_node: int
    group_size: int


@dataclass(frozen=True)
class Traffic:
    """The bytes that a step moves.

    Attributes:
        gathered: bytes that one rank receives of the base in a micro-batch.
        reduced: bytes of the gradient buffer.
        accumulation: micro-batches of a rank in a step.
        invariant: the gradients are summed in a fixed order (`sharding.gradient_sum`).
    """

    gathered: int
    reduced: int
    accumulation: int
    invariant: bool


def between_nodes(placement: Placement, traffic: Traffic) -> dict[str, int]:
    """Bytes that come into each node from other nodes.

    Gathers and reductions run as rings over consecutive ranks (NCCL's and gloo's own for large tensors), which enter
    each node once. So a gather brings a node as much as it brings one rank, or nothing if the shard group lies within
    the node; and a ring all-reduce of B bytes brings it 2 (N-1)/N B. With `invariant` it is an all-to-all, in which
    every rank of the node receives its 1/N of the other nodes' subtree sums, and a ring all-gather of (N-1)/N B.
    """
    ranks, per_node = placement.world_size, placement.ranks_per_node
    if ranks == per_node:
        return _links(0, 0, traffic.accumulation)
    of_base = 0 if within_nodes(placement.group_size, per_node) else traffic.gathered
    ring = traffic.reduced * (ranks - 1) // ranks
    if not traffic.invariant:
        return _links(of_base, 2 * ring, traffic.accumulation)
    first_leaves = [rank * traffic.accumulation for rank in range(per_node, ranks)]  # as the first node sees them
    sums = sum(len(nodes_within(leaf, leaf + traffic.accumulation)) for leaf in first_leaves)
    return _links(of_base, ring + sums * per_node * traffic.reduced // ranks, traffic.accumulation)


def _links(of_base: int, of_gradients: int, accumulation: int) -> dict[str, int]:
    return {
        "gather_bytes_per_micro_batch": of_base,
        "gather_bytes_per_step": of_base * accumulation,
        "reduce_bytes_per_step": of_gradients,
    }
