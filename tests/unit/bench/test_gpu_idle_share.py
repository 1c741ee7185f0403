"""The share of a step in which a GPU works, from a profiler's events; the profiler lists the host's calls as well."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType

FOLDER = Path(__file__).parents[3] / "benchmarks/gpu"


@pytest.fixture
def steps(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    spec = importlib.util.spec_from_file_location("gpu_steps", FOLDER / "steps.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("parts", None)


def event(name: str, start: float, end: float, device=DeviceType.CUDA, annotation=False):
    time_range = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(name=name, device_type=device, time_range=time_range, is_user_annotation=annotation)


def test_only_work_of_the_gpu_is_busy(steps):
    events = [
        event("cudaDeviceSynchronize", 0.0, 100.0, DeviceType.CPU),
        event("gather", 15.0, 30.0),
        event("product", 10.0, 20.0),
        event("copy", 50.0, 55.0),
        event("optimizer", 0.0, 100.0, annotation=True),
    ]
    spans = steps.device_spans(events)
    assert [name for _, _, name in spans] == ["product", "gather", "copy"]
    assert steps.busy_microseconds(spans) == 25.0


def test_a_gather_is_hidden_while_anything_else_works(steps):
    gathers = [(0.0, 10.0, "gather"), (20.0, 30.0, "gather"), (25.0, 40.0, "gather")]
    products = [(5.0, 22.0, "product"), (35.0, 50.0, "product")]
    assert steps.alone_microseconds(gathers, products) == 5.0 + 13.0
    assert steps.alone_microseconds(products, gathers) == 10.0 + 10.0
    assert steps.alone_microseconds(gathers, []) == 30.0
