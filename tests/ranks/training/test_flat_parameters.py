"""The flat buffer on real ranks: what leaves when, what comes out, and what stops everybody."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_qft.errors import NumericError
from dist_qft.training.fixed_tree import FixedTree
from dist_qft.training.flat_parameters import FlatParameters
from tests.support.collectives import gather_gradients

WIDTH, LAYERS = 6, 4
COUNT = LAYERS * (WIDTH * WIDTH + WIDTH)
LANES = 4 + 2 * 16  # tokens (2), loss, stop; the digest's pieces and their squares

each_world = pytest.mark.parametrize("world", [2, 4])
each_reduction = pytest.mark.parametrize("reduction", ["fast", "invariant", "fast, spread", "invariant, spread"])


def build(seed: int = 0) -> nn.Sequential:
    """Linear layers with tanh between them; named "0.weight", "0.bias", "2.weight", ..."""
    net = nn.Sequential(*[layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return net


def tokens_of(rank: int, micro: int, count: int) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(100 * rank + micro))


def summed_loss(net: nn.Module, tokens: Tensor) -> Tensor:
    return (net(tokens) - 0.3).square().sum()


def make(
    seed: int = 0, bucket_bytes: int = 300, micro_batches: int | None = None, **settings: Any
) -> tuple[nn.Sequential, FlatParameters]:
    """With `micro_batches` they are summed in a fixed tree."""
    net = build(seed)
    tree = FixedTree(micro_batches) if micro_batches else None
    return net, FlatParameters(list(net.named_parameters()), bucket_bytes=bucket_bytes, tree=tree, **settings)


def settings_of(reduction: str, micro_batches: int) -> dict[str, Any]:
    kind, _, spread = reduction.partition(", ")
    return {"micro_batches": micro_batches if kind == "invariant" else None, "shard": bool(spread)}


@contextmanager
def recorded_reductions(events: list) -> Iterator[None]:
    """Context in which every all-reduce of this process is recorded, and done."""
    real = dist.all_reduce

    @functools.wraps(real)
    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        events.append(("reduce", tensor.storage_offset(), tensor.numel()))
        return real(tensor, *args, **kwargs)

    dist.all_reduce = all_reduce
    try:
        yield
    finally:
        dist.all_reduce = real


def outcome(act: Callable[[], Any]) -> tuple[str, int] | None:
    """Message and exit code of the NumericError that `act` raises, if it does."""
    try:
        act()
    except NumericError as error:
        return str(error), error.exit_code
    return None


# --- what leaves when ------------------------------------------------------------------------------------------------


def three_steps(bucket_bytes: int, own_group: bool) -> dict[str, Any]:
    """Three steps of three micro-batches; the all-reduces of each backward pass and of each `reduce`."""
    rank = dist.get_rank()
    group = dist.new_group() if own_group else None
    net, trainables = make(bucket_bytes=bucket_bytes, group=group, rank_stats_size=2)
    events: list = []
    for name, parameter in trainables.named:
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: events.append(("gradient", name)))
    steps = []
    with recorded_reductions(events):
        for step in range(3):
            trainables.begin_step()
            passes = []
            for micro in range(3):
                if micro == 2:
                    trainables.reduce_during_backward()
                summed_loss(net, tokens_of(rank, micro, 5)).backward()
                trainables.end_micro_batch(1.0)
                passes.append(list(events))
                events.clear()
            trainables.reduce(tokens=15, step=step, rank_stats=(0.0, 0.0))
            steps.append({"passes": passes, "after": list(events)})
            events.clear()
    return {
        "steps": steps,
        "rounds": trainables.rounds,
        "reduced_bytes": trainables.reduced_bytes,
        "bytes_per_reduction": trainables.bytes_per_reduction,
    }


@pytest.mark.parametrize(("world", "own_group"), [(1, False), (2, True), (4, False)])
def test_one_round_per_step_of_gradients_and_a_small_header(pools, world, own_group):
    for result in pools[world].run(three_steps, bucket_bytes=300, own_group=own_group):
        lanes = LANES + world * (1 + 2)
        assert result["bytes_per_reduction"] == 4 * (COUNT + lanes)
        assert (result["rounds"], result["reduced_bytes"]) == (3, 3 * result["bytes_per_reduction"])
        for step in result["steps"]:
            reductions = [event[1:] for part in [*step["passes"], step["after"]] for event in part if len(event) == 3]
            # Slices that follow one another and cover the buffer once: nothing is sent twice, nothing left out.
            assert [start for start, _ in reductions] == [
                sum(n for _, n in reductions[:i]) for i in range(len(reductions))
            ]
            assert sum(numel for _, numel in reductions) == COUNT + lanes


@each_world
def test_buckets_leave_while_the_last_backward_still_runs(pools, world):
    results = pools[world].run(three_steps, bucket_bytes=300, own_group=False)
    for result in results:
        for step in result["steps"]:
            first, second, last = [[kind for kind, *_ in part] for part in step["passes"]]
            assert "reduce" not in first + second
            assert "gradient" in last[last.index("reduce") :], "the first bucket waited for the last gradient"
            assert last.count("reduce") >= 3
            assert [kind for kind, *_ in step["after"]] == ["reduce"]  # the last bucket takes the header along
    orders = [[event for event in result["steps"][0]["passes"][2] if event[0] == "reduce"] for result in results]
    assert all(order == orders[0] for order in orders)


@pytest.mark.parametrize(("bucket_bytes", "buckets"), [(1, 2 * LAYERS), (10**9, 1)])
def test_bucket_sizes(pools, bucket_bytes, buckets):
    for result in pools[2].run(three_steps, bucket_bytes=bucket_bytes, own_group=False):
        step = result["steps"][0]
        assert sum(event[0] == "reduce" for event in [*step["passes"][2], *step["after"]]) == buckets


# --- what comes out --------------------------------------------------------------------------------------------------


def gradients(counts: list[list[int | None]], reduction: str) -> dict[str, Any]:
    """One step; `counts[rank]` are the tokens of its micro-batches. None: no forward pass at all."""
    rank = dist.get_rank()
    net, trainables = make(**settings_of(reduction, len(counts[0])))
    places = [parameter.grad.data_ptr() for parameter in net.parameters()]
    trainables.begin_step()
    for micro, count in enumerate(counts[rank]):
        if micro + 1 == len(counts[rank]):
            trainables.reduce_during_backward()
        loss = torch.zeros(())
        if count is not None:
            loss = summed_loss(net, tokens_of(rank, micro, count))
            loss.backward()
        trainables.end_micro_batch(loss.detach())
    totals = trainables.reduce(tokens=sum(filter(None, counts[rank])), step=1)
    assert [parameter.grad.data_ptr() for parameter in net.parameters()] == places, "a gradient left the buffer"
    gather_gradients(trainables)
    found = {name: parameter.grad.clone() for name, parameter in net.named_parameters()}
    return {"gradients": found, "tokens": totals.tokens, "loss_sum": totals.loss_sum}


@each_reduction
@pytest.mark.parametrize(
    "counts",
    [
        [[4, 4], [4, 4]],
        [[1, 2], [30, 7]],
        [[3, 9], [0, 0]],
        [[3, 9], [5, None]],
        [[3, 9], [None, None]],
        [[1], [2], [0], [40]],
        [[5, 1, 7], [None, 2, None], [0, 0, 0], [3, 3, 3]],
    ],
    ids=str,
)
def test_gradient_is_the_mean_over_all_tokens_of_all_ranks(pools, counts, reduction):
    results = pools[len(counts)].run(gradients, counts=counts, reduction=reduction)
    net = build().double()
    pieces = [(r, m, n) for r, micros in enumerate(counts) for m, n in enumerate(micros) if n]
    tokens = torch.cat([tokens_of(*piece).double() for piece in pieces])
    loss = summed_loss(net, tokens)
    (loss / len(tokens)).backward()
    for result in results:
        assert result["tokens"] == len(tokens)
        assert result["loss_sum"] == pytest.approx(loss.item(), rel=1e-5)
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(result["gradients"][name].double(), parameter.grad, rtol=1e-4, atol=1e-6)
            assert torch.equal(result["gradients"][name], results[0]["gradients"][name]), "ranks differ in a bit"


def many_tokens(counts: list[int]) -> tuple[int, float]:
    _, trainables = make()
    trainables.begin_step()
    trainables.values.grad.fill_(1.0)
    totals = trainables.reduce(tokens=counts[dist.get_rank()], step=1)
    return totals.tokens, trainables.values.grad[0].item()


@pytest.mark.parametrize("counts", [[2**24 + 1, 2**24 + 2], [2**33 + 4095, 1, 4095, 2**33 - 1], [0, 0]], ids=str)
def test_token_counts_beyond_float32_are_exact(pools, counts):
    total = sum(counts)
    for tokens, gradient in pools[len(counts)].run(many_tokens, counts=counts):
        assert tokens == total
        assert gradient == pytest.approx(len(counts) / max(total, 1), rel=1e-6)


def passengers(stopping: int | None, reduction: str) -> tuple[bool, list[list[float]]]:
    rank = dist.get_rank()
    _, trainables = make(rank_stats_size=2, **settings_of(reduction, 1))
    seen = []
    for step in range(2):
        trainables.begin_step()
        report = (1000.5 + rank, step / 4)
        seen.append(trainables.reduce(tokens=1, step=step, stop=rank == stopping, rank_stats=report))
    return seen[-1].stop, seen[-1].rank_stats


@each_world
@each_reduction
@pytest.mark.parametrize("stopping", [None, 0, 1])
def test_stop_and_reports_ride_along(pools, world, stopping, reduction):
    expected = (stopping is not None, [[1000.5 + rank, 0.25] for rank in range(world)])
    assert pools[world].run(passengers, stopping=stopping, reduction=reduction) == [expected] * world


# --- non-finite numbers ----------------------------------------------------------------------------------------------


def poisoned(where: str, values: list[float], reduction: str = "fast") -> tuple[tuple[str, int] | None, bool, bool]:
    """A micro-batch with `values[rank]` in one gradient element, or in the loss; in a tree a good one follows.

    Returns what was raised, whether the values stayed as they were, and whether all gradients are finite.
    """
    rank = dist.get_rank()
    net, trainables = make(**settings_of(reduction, 2))
    before = trainables.values.detach().clone()
    loss_sum = torch.tensor(values[rank] if where == "loss" else 1.0)
    if where != "loss":

        def poison(gradient: Tensor) -> Tensor:
            gradient = gradient.clone()
            gradient.view(-1)[3] = values[rank]
            return gradient

        hook = dict(net.named_parameters())[where].register_hook(poison)
    trainables.begin_step()
    if reduction.startswith("invariant"):
        summed_loss(net, tokens_of(rank, 0, 5)).backward()
        trainables.end_micro_batch(loss_sum)
        loss_sum = torch.tensor(1.0)
        if where != "loss":
            hook.remove()
    trainables.reduce_during_backward()
    summed_loss(net, tokens_of(rank, 0, 5)).backward()
    trainables.end_micro_batch(loss_sum)
    raised = outcome(lambda: trainables.reduce(tokens=5, step=7))
    gather_gradients(trainables)
    return raised, torch.equal(before, trainables.values), bool(trainables.values.grad.isfinite().all())


@each_world
@each_reduction
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["0.bias", "4.weight", "6.bias"])
def test_one_bad_element_on_one_rank_stops_all(pools, world, bad, where, reduction):
    values = [0.5] * world
    values[world - 1] = bad
    text = f"step 7: non-finite gradient on rank {world - 1}, first in {where}; nothing was updated"
    results = pools[world].run(poisoned, where=where, values=values, reduction=reduction)
    assert results == [((text, 6), True, False)] * world


@each_reduction
def test_bad_losses_and_several_ranks_are_named(pools, reduction):
    values = [float("nan"), 1.0, float("inf"), 1.0]
    text = "step 7: non-finite gradient on rank 0, 2, first in the loss; nothing was updated"
    results = pools[4].run(poisoned, where="loss", values=values, reduction=reduction)
    assert results == [((text, 6), True, True)] * 4


def test_overflow_in_the_sum_alone_is_nobodys_fault(pools):
    text = "step 7: non-finite gradient in the sum over ranks, first in 2.weight; nothing was updated"
    assert pools[2].run(poisoned, where="2.weight", values=[3e38, 3e38]) == [((text, 6), True, False)] * 2


def test_large_finite_gradients_pass(pools):
    assert pools[2].run(poisoned, where="2.weight", values=[1e30, -1e30]) == [(None, True, True)] * 2


# --- replicas that differ --------------------------------------------------------------------------------------------


def drift(kind: str, victim: int, seeds: list[int], broadcast: bool) -> list[tuple[str, int] | None]:
    """Steps of SGD with a perturbation before step 2; what `reduce` raised at steps 1, 2 (unchecked) and 3."""
    rank = dist.get_rank()
    net, trainables = make(seeds[rank])
    if broadcast:
        trainables.broadcast()
    raised = []
    for step, check in ((1, True), (2, False), (3, True)):
        if step == 2:
            perturb(kind, rank, victim, net, trainables)
        trainables.begin_step()
        trainables.reduce_during_backward()
        summed_loss(net, tokens_of(rank, step, 5)).backward()
        trainables.end_micro_batch(1.0)
        raised.append(outcome(lambda: trainables.reduce(tokens=5, step=step, check_digest=check)))  # noqa: B023
        trainables.values.data.sub_(trainables.values.grad, alpha=0.01)
    return raised


def perturb(kind: str, rank: int, victim: int, net: nn.Sequential, trainables: FlatParameters) -> None:
    words = trainables.values.data.view(torch.int32)
    if kind == "bit" and rank == victim:
        net[4].weight.data.view(torch.int32)[1, 2] ^= 1
    elif kind == "sign of zero":
        net[0].bias.data[0] = -0.0 if rank == victim else 0.0
    elif kind == "step" and rank == victim:
        trainables.values.data.sub_(trainables.values.grad, alpha=0.01)
    elif kind == "average":
        # The first word's weight is 1: these digests differ by -1 and +1, and sum to what equal ones would.
        words[0] += {victim: 1, (victim + 1) % dist.get_world_size(): -1}.get(rank, 0)


@each_world
@pytest.mark.parametrize(("kind", "tensor"), [("bit", "4.weight"), ("step", "0.weight")])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_drifted_replica_is_named_at_the_next_check(pools, world, kind, tensor, victim):
    results = pools[world].run(drift, kind=kind, victim=victim, seeds=[0] * world, broadcast=True)
    odd, other = (victim, 1 - victim) if world > 2 else (1, 0)  # of two, rank 0 is the yardstick
    text = f"step 3: replicas differ, first in {tensor}: rank {odd} differs from rank {other}"
    assert results == [[None, None, (text, 6)]] * world


def test_the_sign_of_a_zero_is_drift_too(pools):
    # Untouched by the update only as long as its gradient is: so the check follows at once.
    results = pools[2].run(perturbed_at_once, kind="sign of zero")
    assert results == [("step 2: replicas differ, first in 0.bias: rank 1 differs from rank 0", 6)] * 2


def perturbed_at_once(kind: str) -> tuple[str, int] | None:
    net, trainables = make()
    trainables.begin_step()
    perturb(kind, dist.get_rank(), 1, net, trainables)
    return outcome(lambda: trainables.reduce(tokens=1, step=2, check_digest=True))


@each_world
def test_differences_that_average_out_are_seen_by_all(pools, world):
    results = pools[world].run(perturbed_at_once, kind="average")
    text, code = results[0]
    assert code == 6
    assert text.startswith("step 2: replicas differ, first in 6.bias: rank 1")
    assert results == [results[0]] * world


@each_world
def test_broadcast_makes_different_starts_equal_and_its_absence_is_noticed(pools, world):
    seeds = [5, *range(10, 9 + world)]
    assert pools[world].run(drift, kind="", victim=0, seeds=seeds, broadcast=True) == [[None] * 3] * world
    for raised in pools[world].run(drift, kind="", victim=0, seeds=seeds, broadcast=False):
        assert raised[0] == ("step 1: replicas differ, first in 0.weight: rank " + _all_but_first(world), 6)


def _all_but_first(world: int) -> str:
    return ", ".join(str(rank) for rank in range(1, world)) + " differs from rank 0"


def broadcast_values(seeds: list[int]) -> Tensor:
    _, trainables = make(seeds[dist.get_rank()])
    trainables.broadcast()
    return trainables.values.detach().clone()


def test_broadcast_sends_rank_0s_values(pools):
    expected = torch.cat([parameter.flatten() for parameter in reversed(list(build(5).parameters()))])
    for values in pools[2].run(broadcast_values, seeds=[5, 6]):
        assert torch.equal(values, expected)
