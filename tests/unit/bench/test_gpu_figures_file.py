"""The file of `benchmarks/gpu.sh`: what failed stays in it until it is done, and what is done is not done again."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).parents[3] / "benchmarks/gpu/parts.py"


@pytest.fixture
def parts():
    spec = importlib.util.spec_from_file_location("gpu_parts", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def boom(asked):
    raise RuntimeError("out of luck\nand more")


def test_failed_and_done(parts, tmp_path, capsys):
    asked = parts.Options(torch.device("cpu"), True, 2, False, tmp_path / "figures.json")
    asked.json.write_text(json.dumps({"first": {"failed": "earlier"}, "second": {"figure": 1}}))
    assert parts.left_over(asked, ("first", "second", "third")) == ["first", "third"]
    assert parts.run_parts(asked, {"second": boom, "third": lambda asked: {"figure": 3}}) == 0
    found = parts.recorded_parts(asked)
    assert found["first"] == {"failed": "earlier"} and found["second"] == {"figure": 1}
    assert found["third"]["figure"] == 3 and found["measured on"]["ranks"] == 2
    assert parts.run_parts(asked, {"first": lambda asked: {"figure": 1}, "fourth": boom}) == 1
    assert parts.left_over(asked, ("first", "second", "third", "fourth")) == ["fourth"]
    assert parts.recorded_parts(asked)["fourth"]["failed"] == "RuntimeError: out of luck"


def test_a_failure_ends_the_parts_that_ranks_do_together(parts, tmp_path, capsys):
    asked = parts.Options(torch.device("cpu"), True, 2, False, tmp_path / "figures.json")
    after = {"failing": boom, "after": lambda asked: {"figure": 1}}
    assert parts.run_parts(asked, after, together=True) == 1
    assert parts.left_over(asked, after) == ["failing", "after"]
    assert parts.run_parts(asked, after) == 1
    assert parts.left_over(asked, after) == ["failing"]
