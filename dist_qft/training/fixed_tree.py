"""A sum over micro-batches whose bits do not depend on how many ranks computed them.

Adding floating-point numbers in another order gives other bits: a rank's micro-batches first and then the ranks' sums
is one order on two ranks and another on four. Here micro-batch j of the step's M is leaf j of a binary tree that M
alone determines:

    node (level, index) = node (level - 1, 2 index) + node (level - 1, 2 index + 1)

where a right child that lies beyond M is left out. Rank r of N computes the leaves [r M/N, (r + 1) M/N) and adds up
the part of the tree that lies within; a few nodes remain, just one where M/N is a power of two. Then every rank
receives all nodes for 1/N of the vector, finishes the tree there, and the ranks gather the parts. With one node per
rank that puts as many bytes on the wire as a ring all-reduce.
"""

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from dist_qft.ranks.collectives import all_gather_flat


@dataclass(frozen=True)
class Node:
    """The subtree over the leaves [index 2^level, (index + 1) 2^level)."""

    level: int
    index: int

    @property
    def first_leaf(self) -> int:
        return self.index << self.level

    @property
    def parent(self) -> "Node":
        return Node(self.level + 1, self.index // 2)

    @property
    def children(self) -> tuple["Node", "Node"]:
        return Node(self.level - 1, 2 * self.index), Node(self.level - 1, 2 * self.index + 1)


def nodes_within(first: int, stop: int) -> list[Node]:
    """The largest subtrees that together have the leaves first to stop - 1, from left to right."""
    nodes = []
    while first < stop:
        level = (stop - first).bit_length() - 1
        if first:
            level = min(level, (first & -first).bit_length() - 1)  # where a subtree may begin
        nodes.append(Node(level, first >> level))
        first += 1 << level
    return nodes


class FixedTree:
    """The sum of vectors, one per micro-batch, over all micro-batches of all ranks.

    Args:
        micro_batches: those of each rank in one step, M/N.
        group: the process group of the exchange.
    """

    def __init__(self, micro_batches: int, group: dist.ProcessGroup | None = None) -> None:
        self._group, self._rank, self._world = group, dist.get_rank(group), dist.get_world_size(group)
        self._leaves = micro_batches * self._world
        self._nodes = [nodes_within(rank * micro_batches, (rank + 1) * micro_batches) for rank in range(self._world)]
        self._first_leaf = self._rank * micro_batches
        self._next_leaf = self._first_leaf
        self._sums: list[tuple[Node, Tensor]] = []

    def clear(self) -> None:
        """Forget the vectors added since the last `reduce`."""
        self._sums.clear()
        self._next_leaf = self._first_leaf

    def add(self, vector: Tensor) -> None:
        """Add the next micro-batch's vector, which is copied; the last one's goes to `reduce`."""
        node, value = self._joined(vector)
        self._sums.append((node, value.clone() if value is vector else value))

    def reduce(self, vector: Tensor) -> None:
        """Add the last micro-batch's vector, and put the sum over all micro-batches in its place. Collective."""
        part = -(-vector.numel() // self._world)
        own = self.reduce_scatter(vector, part)
        whole = vector.new_empty(self._world * part)
        all_gather_flat(whole, own, group=self._group)
        vector.copy_(whole[: vector.numel()])

    def reduce_scatter(self, vector: Tensor, part: int, shared: int = 0) -> Tensor:
        """Add the last micro-batch's vector and return this rank's `part` elements of the sum. Collective.

        The parts follow each other in the order of the ranks, and the last of them may be short. The last `shared`
        elements of the vector belong to no part: every rank gets their sum behind its own.
        """
        self._sums.append(self._joined(vector))
        own = self._nodes[self._rank]
        assert [node for node, _ in self._sums] == own, "not every micro-batch was added"
        sent = self._by_receiver(part, shared)
        self.clear()
        counts, size = [len(nodes) for nodes in self._nodes], part + shared
        received = vector.new_empty(sum(counts), size)
        dist.all_to_all_single(
            received.view(-1),
            sent.view(-1),
            [count * size for count in counts],
            [len(own) * size] * self._world,
            group=self._group,
        )
        nodes = (node for of_rank in self._nodes for node in of_rank)
        return self._finish(dict(zip(nodes, received, strict=True)))

    def _by_receiver(self, part: int, shared: int) -> Tensor:
        """Copies of the sums' parts, (ranks, sums, part + shared); a short part is not filled up."""
        first = self._sums[0][1]
        divided = first.numel() - shared
        sent = first.new_empty(self._world, len(self._sums), part + shared)
        for place, (_, value) in enumerate(self._sums):
            for receiver, piece in enumerate(value[:divided].split(part)):
                sent[receiver, place, : piece.numel()] = piece
            sent[:, place, part:] = value[divided:]
        return sent

    def _joined(self, vector: Tensor) -> tuple[Node, Tensor]:
        """The next leaf, added to the sums of the subtrees that it completes."""
        node, value = Node(0, self._next_leaf), vector
        self._next_leaf += 1
        while self._sums and node.index % 2 and self._sums[-1][0] == Node(node.level, node.index - 1):
            _, left = self._sums.pop()
            node, value = node.parent, left.add_(value)
        return node, value

    def _finish(self, sums: dict[Node, Tensor]) -> Tensor:
        """The root's sum, from those of subtrees that together have all leaves; uses them up."""

        def value(node: Node) -> Tensor:
            if node in sums:
                return sums[node]
            left, right = node.children
            return value(left).add_(value(right)) if right.first_leaf < self._leaves else value(left)

        return value(Node((self._leaves - 1).bit_length(), 0))
