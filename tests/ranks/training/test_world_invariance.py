"""`sharding.gradient_sum: invariant`: the bits of a run do not depend on the number of ranks, nor on the engine."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dist_qft.config.check import config_warnings
from dist_qft.storage.checkpoint import OPTIMIZER
from dist_qft.storage.manifest import sha256_of
from dist_qft.training.fixed_tree import FixedTree, Node, nodes_within
from tests.support.invariance import invariant_run
from tests.support.tiny_model import tiny_config

# Method -> engines and numbers of ranks that must write the same bits; more of both: benchmarks/invariance.py
LAYOUTS = {
    "qlora, dropout": [("replicated", 1), ("fsdp", 2), ("fsdp", 3), ("zero", 2)],
    "qahira, merge-aware": [("replicated", 1), ("fsdp", 4), ("zero", 2)],
    "qst": [("replicated", 1), ("fsdp", 3), ("zero", 4)],
}


# --- the tree --------------------------------------------------------------------------------------------------------


def leaves_of(node: Node, count: int) -> range:
    return range(node.first_leaf, min(node.first_leaf + 2**node.level, count))


@pytest.mark.parametrize("world", range(1, 9))
@pytest.mark.parametrize("micro_batches", [1, 2, 3, 4, 5, 7, 8, 12, 33])
def test_the_ranks_subtrees_have_every_leaf_once(world, micro_batches):
    count = world * micro_batches
    found = []
    for rank in range(world):
        nodes = nodes_within(rank * micro_batches, (rank + 1) * micro_batches)
        assert len(nodes) == 1 or micro_batches & (micro_batches - 1), "a power of two is one subtree"
        assert len(nodes) <= 2 * micro_batches.bit_length()
        found += [leaf for node in nodes for leaf in leaves_of(node, count)]
    assert found == list(range(count))


def vectors(count: int, size: int) -> Tensor:
    """Of very different magnitudes, so that nearly every order of adding gives other bits."""
    generator = torch.Generator().manual_seed(size)
    return torch.randn(count, size, generator=generator) * 10.0 ** torch.randint(-3, 4, (count, 1), generator=generator)


def by_the_definition(leaves: Tensor) -> Tensor:
    """The tree's sum, written down as pairs that are added level by level."""
    values = list(leaves)
    while len(values) > 1:
        pairs = [values[i : i + 2] for i in range(0, len(values), 2)]
        values = [pair[0] + pair[1] if len(pair) == 2 else pair[0] for pair in pairs]
    return values[0]


def summed_twice(count: int, size: int) -> list[Tensor]:
    share = count // dist.get_world_size()
    tree, out = FixedTree(share), torch.empty(size)
    leaves, totals = vectors(count, size), []
    for step in range(2):
        tree.add(leaves[-1])  # of a step that was given up
        tree.clear()
        *first, last = leaves[dist.get_rank() * share : (dist.get_rank() + 1) * share] * (step + 1)
        for leaf in first:
            tree.add(leaf)
        out.copy_(last)
        tree.reduce(out)
        totals.append(out.clone())
    return totals


@pytest.mark.parametrize("size", [1, 3, 1001])
@pytest.mark.parametrize(("count", "world"), [(12, n) for n in (1, 2, 3, 4)] + [(1, 1), (20, 4), (21, 3), (64, 2)])
def test_sums_have_the_definitions_bits(pools, count, world, size):
    expected = by_the_definition(vectors(count, size))
    for once, twice in pools[world].run(summed_twice, count=count, size=size):
        assert torch.equal(once, expected)
        assert torch.equal(twice, 2 * expected)  # exact: a power of two


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", LAYOUTS)
def test_any_world_and_engine_write_the_same_adapter(pools, tiny_llama, tmp_path, method):
    runs = {
        (engine, world): invariant_run(pools[world], tiny_llama, tmp_path / f"{engine}{world}", method, engine)
        for engine, world in LAYOUTS[method]
    }
    assert len({digest for _, digest in runs.values()}) == 1, runs
    assert all(losses == runs["replicated", 1][0] for losses, _ in runs.values())


def test_resuming_on_other_worlds_changes_no_bit(pools, tiny_llama, tmp_path):
    """Nor does spreading the optimizer over the ranks, in the adapter or in the optimizer's own file."""
    whole = invariant_run(pools[2], tiny_llama, tmp_path / "whole", "qahira, merge-aware", "fsdp")
    chain = [(2, 3, "fsdp", True), (3, 1, "replicated", True), (5, 4, "fsdp", False), (6, 2, "replicated", True)]
    for steps, world, engine, shard in chain:
        settings = {"max_steps": steps, "resume": "auto", "shard_optimizer": shard}
        found = invariant_run(pools[world], tiny_llama, tmp_path / "chain", "qahira, merge-aware", engine, **settings)
    assert found == whole
    states = [sha256_of(tmp_path / run / "run" / "checkpoint-6" / OPTIMIZER) for run in ("whole", "chain")]
    assert states[0] == states[1]


def test_settings_of_the_other_reduction_are_warned_of(tmp_path):
    config = tiny_config(tmp_path, tmp_path / "run", sharding={"gradient_sum": "invariant", "bucket_megabytes": 4.0})
    assert "sharding.bucket_megabytes: no effect with gradient_sum invariant" in config_warnings(config)
