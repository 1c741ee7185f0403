"""FSDP2 of PyTorch before 2.12, which makes all its parameters as ones that have a gradient."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp._fully_shard import _fsdp_param

from dist_qft.sharding import fsdp


def test_it_makes_parameters_of_integers(monkeypatch):
    monkeypatch.setattr(fsdp, "_SHARDS_INTEGERS", "99")
    with fsdp._integers_are_sharded():
        assert not _fsdp_param.nn.Parameter(torch.zeros(2, dtype=torch.uint8)).requires_grad
        assert _fsdp_param.nn.Parameter(torch.zeros(2), requires_grad=True).requires_grad
        assert _fsdp_param.nn.Module is nn.Module
    assert _fsdp_param.nn is nn


def test_later_versions_are_left_alone(monkeypatch):
    monkeypatch.setattr(fsdp, "_SHARDS_INTEGERS", "2.0")
    with fsdp._integers_are_sharded(), pytest.raises(RuntimeError):
        _fsdp_param.nn.Parameter(torch.zeros(2, dtype=torch.uint8))
