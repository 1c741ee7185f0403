"""The device of a rank, and the groups that it leaves; GPUs are imagined."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dist_qft.errors import NumericError, SetupError, UserError
from dist_qft.ranks import device, local_peers
from dist_qft.ranks.device import (
    CPU_PRECISION,
    bfloat16_units,
    compute_dtype,
    compute_reproducibly,
    device_for,
    let_segments_grow,
    order_required,
)
from dist_qft.ranks.groups import leave_group
from dist_qft.ranks.local_peers import machine_number, require_own_gpus
from dist_qft.ranks.world import World
from dist_qft.training.step_meter import held_bytes


def world_of(local_rank: int) -> World:
    """A rank of the second of two nodes with four ranks each."""
    return World(4 + local_rank, 8, local_rank, 4, "10.0.0.7", 29400, "torchrun")


def test_machines_of_one_host_name_are_two(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = machine_number()
    assert own == machine_number()
    (tmp_path / "boot_id").write_text("another boot")
    monkeypatch.setattr(local_peers, "_BOOT_ID", tmp_path / "boot_id")
    assert machine_number() != own


def test_device_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    world = World.from_environment({})
    assert device_for(world, "auto") == device_for(world, "cpu") == torch.device("cpu")
    with pytest.raises(SetupError, match=r"sharding\.device: cuda was asked for, but .* no CUDA device") as raised:
        device_for(world, "cuda")
    assert raised.value.exit_code == 3


def test_device_is_one_gpu_per_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    world = world_of(1)
    assert device_for(world, "auto") == device_for(world, "cuda") == torch.device("cuda", 1)
    assert device_for(world, "cpu") == torch.device("cpu")
    third = world_of(2)
    with pytest.raises(SetupError, match="rank 6 is number 3 of 4 ranks on this node, which sees 2 GPUs"):
        device_for(third, "auto")


def test_one_visible_gpu_is_this_ranks_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    fourth = world_of(3)
    assert device_for(fourth, "auto") == torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("flags", "units"),
    [
        ("flags\t\t: fpu avx2", ()),
        ("flags\t\t: fpu avx512_bf16 avx2", ("avx512_bf16",)),
        ("processor\t: 0\nflags\t\t: amx_bf16 amx_tile avx512_bf16\nflags\t\t: fpu", ("amx_bf16", "avx512_bf16")),
        ("Features\t: fp asimd bf16", ()),
    ],
)
def test_units_that_multiply_bfloat16(tmp_path, flags, units):
    file = tmp_path / "cpuinfo"
    file.write_text(flags + "\n")
    assert bfloat16_units(file) == units
    assert bfloat16_units(tmp_path / "none") == ()


def test_auto_is_bfloat16_where_it_is_multiplied_natively(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert compute_dtype("auto", cuda) == torch.bfloat16
    assert compute_dtype("float32", cuda) == torch.float32
    monkeypatch.delenv(CPU_PRECISION)
    assert compute_dtype("auto", cpu) == (torch.bfloat16 if bfloat16_units() else torch.float32)
    for units, expected in (((), torch.float32), (("amx_bf16",), torch.bfloat16)):
        monkeypatch.setattr(device, "bfloat16_units", lambda units=units: units)
        assert compute_dtype("auto", cpu) == expected
    monkeypatch.setenv(CPU_PRECISION, "float32")
    assert compute_dtype("auto", cpu) == torch.float32
    monkeypatch.setenv(CPU_PRECISION, "half")
    with pytest.raises(SetupError, match="DIST_QFT_CPU_PRECISION: got half, must be one of float32, bfloat16"):
        compute_dtype("auto", cpu)


@pytest.mark.parametrize(
    ("error", "ranks", "device", "destroyed"),
    [
        (None, 2, "cuda", True),
        (UserError("rank 1 alone"), 2, "cuda", False),
        (RuntimeError("out of memory"), 2, "cuda", False),
        (NumericError("on all ranks at once"), 2, "cuda", True),
        (UserError("nobody waits"), 1, "cuda", True),
        (UserError("gloo waits for nobody"), 2, "cpu", True),
    ],
)
def test_a_rank_that_fails_alone_does_not_wait_for_nccl(monkeypatch, error, ranks, device, destroyed) -> None:
    calls: list[object] = []
    monkeypatch.setattr(dist, "destroy_process_group", calls.append)
    monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
    try:
        if error is not None:
            raise error
        leave_group(torch.device(device))
    except (UserError, NumericError, RuntimeError):
        leave_group(torch.device(device))
    assert calls == ([None] if destroyed else [])


def test_two_ranks_with_one_gpu_are_refused_on_all_ranks():
    require_own_gpus([0, 0, 0])  # CPUs
    require_own_gpus([7, -3, 5])
    with pytest.raises(SetupError, match="ranks 1 and 3 have the same GPU") as raised:
        require_own_gpus([7, -3, 5, -3])
    assert raised.value.everywhere


def test_what_others_allocate_on_a_gpu_counts(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30, 100))
    assert held_bytes(torch.device("cuda", 0)) == 70


def test_a_gpu_adds_in_one_order_where_bits_are_promised(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        compute_reproducibly(torch.device("cpu"))
        assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
        compute_reproducibly(torch.device("cuda"))
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert not torch.is_deterministic_algorithms_warn_only_enabled()  # flash attention would only warn
        assert not torch.utils.deterministic.fill_uninitialized_memory
        compute_reproducibly(torch.device("cuda"), asked=False)  # the next run of a study wants it fast
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True


def test_an_operator_without_one_order_is_the_configs_mistake():
    try:
        torch.use_deterministic_algorithms(True)
        with (
            pytest.raises(UserError, match="gradient_sum: got invariant, must be fast: put_") as raised,
            order_required(),
        ):
            torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))
        assert raised.value.everywhere
        with pytest.raises(RuntimeError, match="another"), order_required():
            raise RuntimeError("another error")
    finally:
        torch.use_deterministic_algorithms(False)


def test_segments_of_gpu_memory_grow_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        with monkeypatch.context() as patched:
            patched.delenv("PYTORCH_ALLOC_CONF", raising=False)
            patched.setenv(name, "max_split_size_mb:512")
            before = dict(os.environ)
            let_segments_grow()
            assert not told and dict(os.environ) == before
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")  # so that it is removed again
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    let_segments_grow()
    assert told == ["expandable_segments:True"] == [os.environ["PYTORCH_ALLOC_CONF"]]
