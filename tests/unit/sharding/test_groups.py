"""The groups of ranks that a setting means, and the bytes that cross the network between nodes."""

import pytest

from dist_qft.errors import UserError
from dist_qft.sharding.shard_group import ranks_in_group
from dist_qft.training.links import Placement, Traffic, between_nodes

BASE, GRADIENTS = 1_000_000, 8_000  # bytes


@pytest.mark.parametrize(
    ("setting", "world_size", "ranks_per_node", "size"),
    [("world", 16, 8, 16), ("node", 16, 8, 8), (4, 16, 8, 4), (16, 16, 8, 16), (1, 3, 3, 1), ("node", 3, 3, 3)],
)
def test_the_size_of_a_group(setting, world_size, ranks_per_node, size):
    assert ranks_in_group(setting, world_size, ranks_per_node) == size


@pytest.mark.parametrize(("setting", "world_size", "ranks_per_node"), [(3, 16, 8), (32, 16, 8), ("node", 10, 4)])
def test_groups_that_do_not_divide_the_ranks_are_refused(setting, world_size, ranks_per_node):
    with pytest.raises(
        UserError, match=f"sharding.group: got {setting}.* must divide the {world_size} ranks"
    ) as raised:
        ranks_in_group(setting, world_size, ranks_per_node)
    assert raised.value.exit_code == 2


def links(world_size: int, ranks_per_node: int, group: int, *, invariant: bool = False) -> tuple[int, int, int]:
    found = between_nodes(Placement(world_size, ranks_per_node, group), Traffic(BASE, GRADIENTS, 4, invariant))
    return found["gather_bytes_per_micro_batch"], found["gather_bytes_per_step"], found["reduce_bytes_per_step"]


def test_what_comes_into_a_node():
    ring = 2 * GRADIENTS * 15 // 16
    assert links(16, 16, 16) == (0, 0, 0), "one node"
    assert links(16, 8, 16) == (BASE, 4 * BASE, ring), "one base over two nodes"
    assert links(16, 8, 8) == links(16, 8, 2) == (0, 0, ring), "a base on each node"
    assert links(12, 4, 6)[0] == BASE, "groups that reach over a node's end"
    # Each rank's four micro-batches are one subtree: eight of the other node, each to eight ranks, a sixteenth of it.
    assert links(16, 8, 8, invariant=True) == (0, 0, GRADIENTS * 15 // 16 + 8 * 8 * GRADIENTS // 16)
