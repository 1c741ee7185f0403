"""The digest that rides along with the reduction, in numbers whose sums are exact."""

import pytest
import torch

from dist_qft.training.digest_lanes import pieces_agree


@pytest.mark.parametrize("world", [2, 3, 4, 256, 4096])
def test_digest_pieces_are_compared_exactly_for_many_ranks(world):
    """Sums of fp32 lanes: the worst case is all ranks at the largest piece, one of them off by one."""
    pieces = torch.full((world, 16), 15.0)
    assert pieces_agree([*pieces.sum(0).tolist(), *pieces.square().sum(0).tolist()], world)
    for value in (14.0, 0.0):
        pieces[world // 2, 11] = value
        assert not pieces_agree([*pieces.sum(0).tolist(), *pieces.square().sum(0).tolist()], world)
