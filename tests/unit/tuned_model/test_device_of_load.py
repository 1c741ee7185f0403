"""The device that `dist_qft.load` takes; GPUs are imagined."""

import pytest
import torch

from dist_qft.errors import SetupError, UserError
from dist_qft.tuned_model.loaded_model import _device


def test_cuda_without_a_number_is_the_present_gpu(monkeypatch):
    """`torch.cuda.set_device` refuses a device without a number."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert _device("cuda") == torch.device("cuda", 3)
    assert _device("cuda:1") == torch.device("cuda", 1) and _device("cpu") == torch.device("cpu")


def test_no_such_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SetupError) as raised:
        _device("cuda")
    assert raised.value.exit_code == 3
    for word in ("gpu", "meta"):
        with pytest.raises(UserError, match="device: got"):
            _device(word)
