"""The processes that share a study's runs on one machine."""

import pytest

from dist_qft.study.run import environments


@pytest.mark.parametrize(
    ("shown", "expected"), [(None, ["0", "1", "0"]), ("4,7", ["4", "7", "4"]), ("GPU-a", ["GPU-a"] * 3)]
)
def test_each_has_a_gpu_in_turn(monkeypatch, shown, expected):
    """All are local rank 0, which would be the first GPU for each of them."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert [env["CUDA_VISIBLE_DEVICES"] for env in environments(3)] == expected


@pytest.mark.parametrize("shown", [None, ""])
def test_a_machine_without_gpus_shows_none(monkeypatch, shown):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert [env.get("CUDA_VISIBLE_DEVICES") for env in environments(2)] == [shown] * 2
