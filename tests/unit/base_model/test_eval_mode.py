"""Eval mode for a while: nothing is dropped out inside, and each module's own mode comes back, also after an error."""

import pytest
import torch
from torch import nn

from dist_qft.base_model.eval_mode import eval_mode


def test_nothing_is_dropped_inside_and_the_modes_come_back():
    trained, answering = nn.Dropout(0.5), nn.Dropout(0.5).eval()
    ones = torch.ones(1000)
    with pytest.raises(KeyError), eval_mode(trained, answering):
        assert torch.equal(trained(ones), ones) and torch.equal(answering(ones), ones)
        raise KeyError
    assert (trained.training, answering.training) == (True, False)
    assert not torch.equal(trained(ones), ones)
