"""Agreements between real ranks, and what becomes of errors and of broken collectives."""

import ctypes
import os
import signal
import time
import traceback
from contextlib import closing
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dist_qft.errors import NumericError, PeerLostError, UserError
from dist_qft.merge.collective import failing_together
from dist_qft.ranks.collectives import SideGroup, everywhere, gather_table, maximum, on_rank_0, require_same_inputs
from dist_qft.ranks.groups import new_group
from dist_qft.ranks.peers import GRACE_SECONDS, Peers, peer_loss_reported
from dist_qft.ranks.session import errors_reported

CPU = torch.device("cpu")


def require(inputs: list[dict[str, str]]) -> tuple[str, int, bool] | None:
    try:
        require_same_inputs(inputs[dist.get_rank()], CPU)
    except UserError as error:
        return str(error), error.exit_code, error.everywhere
    return None


def gathered_table(parts: list[dict[int, list[float]]]) -> dict[int, list[float]]:
    return gather_table(parts[dist.get_rank()], 2, CPU)


def slow_on_rank_0(seconds: float, aside: bool) -> bool:
    """True if the ranks come together although rank 0 works longer than a collective may take."""
    world, limit = dist.group.WORLD, timedelta(seconds=seconds / 4)
    dist.distributed_c10d._set_pg_timeout(limit, world)
    try:
        with closing(SideGroup(60)) as side, failing_together(Path("result"), CPU, side=side if aside else None):
            if dist.get_rank() == 0:
                time.sleep(seconds)
    finally:
        dist.distributed_c10d._set_pg_timeout(timedelta(minutes=10), world)
    return True


def test_ranks_wait_for_a_slow_write_longer_than_for_a_collective(pools):
    assert pools[2].run(slow_on_rank_0, seconds=2.0, aside=True) == [True, True]


def test_every_rank_gets_the_rows_of_all_in_their_order(pools):
    parts = [{7: [0.5, float("inf")], 2: [1.0, 2.0]}, {2**40: [3.0, -0.25]}]
    expected = {2: [1.0, 2.0], 7: [0.5, float("inf")], 2**40: [3.0, -0.25]}
    for found in pools[2].run(gathered_table, parts=parts) + pools[2].run(gathered_table, parts=parts[::-1]):
        assert found == expected and list(found) == list(expected)
    assert pools[2].run(gathered_table, parts=[{}, {}]) == [{}, {}]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_equal_inputs_pass(pools, world):
    inputs = [{"config": "x" * 1000, "data": ""}] * world
    assert pools[world].run(require, inputs=inputs) == [None] * world


def test_the_first_input_that_differs_is_named_with_its_ranks(pools):
    inputs = [
        {"config": "a", "data": "d"},
        {"config": "a", "data": "e"},
        {"config": "b", "data": "e"},
        {"config": "a", "data": "d"},
    ]
    text = "ranks were started with different config: rank 2 differs from rank 0"
    assert pools[4].run(require, inputs=inputs) == [(text, 2, True)] * 4
    inputs[2] = inputs[1]
    text = "ranks were started with different data: rank 1, 2 differs from rank 0"
    assert pools[4].run(require, inputs=inputs) == [(text, 2, True)] * 4


def largest(values: list[float]) -> float:
    return maximum(values[dist.get_rank()], CPU)


@pytest.mark.parametrize("values", [[1.0, 2.0**53 + 2], [-3.5, -7.0], [0.0, 5.0, 1e300, 4.0]], ids=str)
def test_maximum(pools, values):
    assert pools[len(values)].run(largest, values=values) == [max(values)] * len(values)


# --- errors ----------------------------------------------------------------------------------------------------------


def shared(error: Exception, failing: int, verb: str) -> tuple[str, str, int, bool]:
    """Kind and text of the error that ends this rank, its exit code, and whether its traceback names its place."""

    def work() -> None:
        if dist.get_rank() == failing:
            raise error

    try:
        if verb == "on rank 0":
            on_rank_0(work, CPU)
        with closing(SideGroup(60)) as side, failing_together(Path("result"), CPU, side=side):
            work()
    except Exception as raised:
        frames = [frame.name for frame in traceback.extract_tb(raised.__traceback__)]
        return type(raised).__name__, str(raised), getattr(raised, "exit_code", 1), "work" in frames
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize("failing", [0, 1])
def test_an_unexpected_error_of_one_rank_ends_all_at_once(pools, failing):
    own = ("ValueError", "Empty array", 1, True)
    other = ("DistQFTError", "result: another rank failed to write it (see its message)", 1, False)
    outcomes = pools[2].run(shared, error=ValueError("Empty array"), failing=failing, verb="together")
    assert outcomes == ([own, other] if failing == 0 else [other, own])


def test_an_unexpected_error_of_rank_0_is_named_by_the_others(pools):
    own = ("ValueError", "Empty array", 1, True)
    other = ("DistQFTError", "an error on rank 0 (see its traceback): ValueError: Empty array", 1, False)
    assert pools[2].run(shared, error=ValueError("Empty array"), failing=0, verb="on rank 0") == [own, other]
    refused = ("UserError", "no", 2)
    found = pools[2].run(shared, error=UserError("no"), failing=0, verb="on rank 0")
    assert [outcome[:3] for outcome in found] == [refused] * 2


def reported(error: BaseException) -> tuple[str, str | None, bool]:
    """Text and rank prefix of what comes out on this rank, and whether it is the error that went in."""
    peers = Peers(lambda: "step 12", torch.device("cpu"), 60)
    try:
        with peer_loss_reported(peers):
            raise error
    except BaseException as raised:
        return str(raised), getattr(raised, "rank_prefix", None), raised is error
    finally:
        peers.close(in_order=True)


def test_an_error_of_one_rank_carries_its_number(pools):
    outcomes = pools[2].run(reported, error=UserError("no such file"))
    assert outcomes == [("no such file", f"rank {rank}", True) for rank in range(2)]


@pytest.mark.parametrize("error", [everywhere(UserError("ranks differ")), NumericError("step 4: replicas differ")])
def test_an_error_of_all_ranks_carries_none(pools, error):
    assert pools[2].run(reported, error=error) == [(str(error), None, True)] * 2


@pytest.mark.parametrize(
    "error",
    [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("gloo"), KeyboardInterrupt()],
    ids=repr,
)
def test_other_errors_are_left_alone(pools, error):
    assert pools[1].run(reported, error=error) == [(str(error), None, True)]


def _lonely(rank: int, store: str, fate: str, folder: Path, pipe) -> None:
    """Three ranks that sum a number over and over; at the third time rank 1 meets its fate and rank 2 waits in C."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
    group = new_group(torch.device("cpu"), 2)  # short only once all are there
    steps = 0
    GRACE_SECONDS["cpu"] = 30.0 if rank == 0 else 0.1
    peers = Peers(lambda: f"step {steps}", torch.device("cpu"), 8)
    try:
        with errors_reported(peers, folder):
            for steps in range(1, 10):
                if rank == 1 and steps == 3:
                    os.kill(os.getpid(), signal.SIGKILL if fate == "killed" else signal.SIGSTOP)
                if rank == 2 and steps == 3:
                    ctypes.CDLL(None).sleep(600)
                dist.all_reduce(torch.ones(1), group=group)
    except PeerLostError as error:
        pipe.send((str(error), error.exit_code, error.rank_prefix))


@pytest.mark.parametrize("fate", ["killed", "stopped"])
def test_a_lost_peer_is_an_error_of_its_own_and_ends_a_rank_that_cannot_notice(tmp_path: Path, fate: str):
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    arguments = (str(tmp_path / "store"), fate, tmp_path, theirs)
    ranks = [context.Process(target=_lonely, args=(rank, *arguments), daemon=True) for rank in range(3)]
    for process in ranks:
        process.start()
    try:
        assert ours.poll(120), "the survivor hangs"
        text, exit_code, prefix = ours.recv()
        ranks[2].join(30)
        assert ranks[2].exitcode == 4
    finally:
        for process in ranks:
            process.kill()
            process.join()
    what = "rank 1 is gone" if fate == "killed" else "rank 1 does not answer, last heard of at step"
    assert text.startswith(f"step 3: {what}") and "all_reduce" in text
    assert (exit_code, prefix) == (4, "rank 0")
    report = (tmp_path / "crash/rank-2.txt").read_text()
    assert "rank 2 of 3, at step 3" in report and f"PeerLostError: step 3: {what}" in report
    assert "sleep" not in report.partition("all threads:")[0] and "_lonely" in report
