"""The slices of the flat buffer, and the norm of a gradient that is cut into chunks."""

import pytest
import torch

from dist_qft.config.schema import TrainConfig
from dist_qft.training.norms import chunk_size, chunk_squares, gradient_norm, norm_of_chunks
from dist_qft.training.optimizer import optimizer_bytes, optimizer_bytes_per_rank, shards_optimizer
from dist_qft.training.slices import BLOCK, Slices, bucket_ends


def test_buckets_are_of_whole_parameters():
    assert bucket_ends([4, 4, 4, 20, 1], 9) == [8, 12, 32, 33]
    assert bucket_ends([5], 1) == [5]
    assert bucket_ends([1, 1, 1], 3) == [3]


@pytest.mark.parametrize("world", [2, 3, 8, 128])
@pytest.mark.parametrize("ends", [[7], [40_000], [1500, 6000, 6100, 40_000], [99_999, 100_000]])
def test_slices_cover_every_value_once_at_blocks_ends(world, ends):
    ranks = [Slices.divide(ends, world, rank) for rank in range(world)]
    pieces = sorted(piece for slices in ranks for piece in slices.own)
    assert [start for start, _ in pieces] == [0, *(stop for _, stop in pieces[:-1])]
    assert pieces[-1][1] == ranks[0].padded >= ends[-1]
    assert all(start % BLOCK == 0 for start, _ in pieces)
    sizes = {sum(stop - start for start, stop in slices.own) for slices in ranks}
    assert len(sizes) == 1 and 0 <= sizes.pop() * world - ends[-1] < world * BLOCK
    assert set(ranks[0].bounds[1:-1]) <= {end // (world * BLOCK) * world * BLOCK for end in ends[:-1]}


def test_a_span_is_found_in_the_slices_that_have_it():
    # Buckets of 1,024 and 1,536 values on two ranks; rank 1 has 512 to 1,023 and 1,792 to 2,559.
    slices = Slices.divide([1100, 2300], 2, 1)
    assert slices.bounds == (0, 1024, 2560) and slices.own == ((512, 1024), (1792, 2560))
    assert slices.within([(0, 600), (1000, 1800), (1900, 1910)]) == [
        (0, 0, 88),
        (0, 488, 512),
        (1, 0, 8),
        (1, 108, 118),
    ]
    assert slices.within([(0, 512), (1024, 1792)]) == []
    assert slices.buckets_of((1000, 1025)) == range(0, 2) and slices.buckets_of((1024, 2300)) == range(1, 2)
    assert slices.updated == ((512, 1024), (1792, 2300)), "padding is not updated"
    assert Slices.divide([100], 2, 1).updated == ((256, 512),), "but a part is never empty"
    assert Slices.whole([10, 30]).within([(5, 15)]) == [(0, 5, 15)]


def test_the_norm_of_chunks_does_not_depend_on_who_sums_which():
    count = 100_001
    chunk = chunk_size(count)
    gradient = torch.randn(count, generator=torch.Generator().manual_seed(0)) * 1e25
    whole = norm_of_chunks(chunk_squares(gradient, chunk))
    assert float(whole) == pytest.approx(float(gradient_norm(gradient)), rel=1e-12)
    for world in (2, 3, 7):
        found = []
        for rank in range(world):
            ((start, stop),) = Slices.divide([count], world, rank, chunk).own
            own = torch.nn.functional.pad(gradient[start:stop], (0, max(0, stop - max(count, start))))
            found.append(chunk_squares(own, chunk))
        assert torch.equal(norm_of_chunks(torch.cat(found)[: -(-count // chunk)]), whole)
    assert [chunk_size(n) for n in (1, 64_000_000, 2_140_000_000)] == [256, 512, 16384]


def test_the_optimizer_is_spread_from_64_million_trainables_on():
    asked = {choice: TrainConfig(shard_optimizer=choice) for choice in (None, True, False)}
    assert [shards_optimizer(asked[None], count, 8) for count in (63_999_999, 64_000_000)] == [False, True]
    assert shards_optimizer(asked[True], 10, 2) and not shards_optimizer(asked[False], 10**9, 2)
    assert not shards_optimizer(asked[True], 10**9, 1)
    for optim in ("adamw", "paged_adamw_8bit"):
        config = TrainConfig(optim=optim)
        for world in (2, 8, 128):
            share = optimizer_bytes_per_rank(config, 64_000_000, world)
            assert 1 <= share * world / optimizer_bytes(config, 64_000_000) <= 1.02
