"""Parts of a run on a GPU, which is imagined: activations kept for the backward pass, and the time of its work."""

from types import SimpleNamespace

import pytest
import torch

from dist_qft.config.train_schema import TrainConfig
from dist_qft.errors import UserError
from dist_qft.methods.trainable import HookedTrainables
from dist_qft.training.activations import choose_activations
from dist_qft.training.compute_clock import ComputeClock

DEVICE = torch.device("cuda", 0)


class Model:
    """A model that keeps what it was asked."""

    supports_gradient_checkpointing = True
    config = SimpleNamespace(model_type="llama")

    def activation_checkpointing_enable(self, arguments, *, every_n_layers, offload):
        self.asked = arguments, every_n_layers, offload

    def disable_input_require_grads(self):
        """Nothing."""

    def train(self):
        """Nothing."""


def test_the_settings_reach_the_library():
    train = TrainConfig(gradient_checkpointing=True, checkpoint_every_n_layers=2, offload_activations=True)
    model = Model()
    choose_activations(model, HookedTrainables(), train, DEVICE)
    assert model.asked == ({"use_reentrant": False}, 2, True)
    with pytest.raises(UserError, match=r"train\.offload_activations: on a CPU"):
        choose_activations(model, HookedTrainables(), train, torch.device("cpu"))


class Event:
    """An event of a stream whose time is the number of events recorded before it."""

    recorded = 0

    def __init__(self, enable_timing):
        self.waited = False

    def record(self, stream):
        Event.recorded += 1
        self.at = Event.recorded

    def synchronize(self):
        self.waited = True

    def elapsed_time(self, end):
        assert end.waited, "read before it has happened"
        return 1000.0 * (end.at - self.at)


def test_a_gpus_work_is_timed_by_its_stream_and_told_a_step_later(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    clock = ComputeClock(DEVICE)
    clock.begin()
    clock.end()
    assert clock.told == 0.0, "nothing has been waited for"
    assert clock.seconds() == clock.told == 1.0
