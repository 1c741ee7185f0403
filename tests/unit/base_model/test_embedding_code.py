"""Token embeddings with code of their own."""

import pytest
import torch
from torch import nn

from dist_qft.base_model.freezing import require_lookup
from dist_qft.errors import UserError


class NormedTable(nn.Embedding):
    def __init__(self) -> None:
        super().__init__(50, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, ids):
        return self.norm(super().forward(ids))


class ClampedTable(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids).clamp(-0.5, 0.5)


def test_embeddings_that_do_more_than_look_up_scale_and_norm_are_refused():
    with torch.device("meta"):
        normed, clamped = NormedTable(), ClampedTable(50, 8)
    require_lookup(normed, 1.0, "inkling")
    with pytest.raises(UserError, match=r"'other' does more with its token embeddings \(ClampedTable\)"):
        require_lookup(clamped, 1.0, "other")
