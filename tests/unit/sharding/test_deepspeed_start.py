"""The environment that DeepSpeed reads beside its configuration."""

import os

import torch

from dist_qft.sharding.deepspeed_start import gpu_as_local_rank


def test_a_rank_that_sees_its_gpu_alone_says_so_while_deepspeed_asks(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    with gpu_as_local_rank(torch.device("cuda", 0)):
        assert os.environ["LOCAL_RANK"] == "0"
    assert os.environ["LOCAL_RANK"] == "3"
    with gpu_as_local_rank(torch.device("cpu")):
        assert os.environ["LOCAL_RANK"] == "3"
