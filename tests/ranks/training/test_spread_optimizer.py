"""`train.shard_optimizer`: the same training and the same saved state, with 1/N of the moments on each rank."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dist_qft.config.schema import TrainConfig
from dist_qft.training.fixed_tree import FixedTree
from dist_qft.training.flat_parameters import FlatParameters
from dist_qft.training.optimizer import Rates, clip_gradient, make_optimizer, smallest_in_8_bits, step_with_ranges
from dist_qft.training.optimizer_state import OptimizerState
from tests.support.collectives import recorded_collectives

WIDTHS = [(150, 90), (90, 333), (333, 40)]  # 57,220 trainables, with the biases
BUCKET = 60_000  # bytes: two buckets end within the buffer
ROWS = 12


class Trained:
    """A small net on this rank, with the flat buffer and the optimizer of a run."""

    def __init__(self, shard: bool, invariant: bool, optim: str) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(*[nn.Linear(*width) for width in WIDTHS])
        self.net, named = net, list(net.named_parameters())
        self.share = ROWS // dist.get_world_size()
        tree = FixedTree(self.share) if invariant else None
        self.flat = FlatParameters(named, bucket_bytes=BUCKET, tree=tree, shard=shard)
        if optim == "adamw":
            config = TrainConfig(learning_rate=0.01, weight_decay=0.1)
            self.optimizer = make_optimizer(config, self.flat.parts)
        else:
            import bitsandbytes

            smallest = smallest_in_8_bits(self.flat.count)
            self.optimizer = bitsandbytes.optim.AdamW8bit(self.flat.parts, lr=0.01, min_8bit_size=smallest)
        self.state = OptimizerState(self.optimizer, self.flat.parts, self.flat.slices)

    def step(self, step: int) -> tuple[float, float]:
        """One step with clipping, and 16 times the learning rate for the first layer; its loss and gradient norm."""
        flat, first = self.flat, dist.get_rank() * self.share
        flat.begin_step()
        for row in range(first, first + self.share):
            if row == first + self.share - 1:
                flat.reduce_during_backward()
            inputs = torch.randn(3, WIDTHS[0][0], generator=torch.Generator().manual_seed(100 * step + row))
            loss = self.net(inputs).square().sum()
            loss.backward()
            flat.end_micro_batch(loss.detach())
        totals = flat.reduce(tokens=3 * self.share, step=step, check_digest=True)
        clip_gradient(flat.parts, totals.grad_norm, 0.3)
        step_with_ranges(self.optimizer, [(part, Rates(16.0)) for part in flat.own_parts([flat.spans["0.weight"]])])
        flat.gather_values()
        return totals.loss_sum / totals.tokens, totals.grad_norm

    def moments(self) -> int:
        """Bytes of the two moments that this rank holds."""
        return sum(
            tensor.nbytes
            for state in self.optimizer.state.values()
            for key, tensor in state.items()
            if key in ("exp_avg", "exp_avg_sq", "state1", "state2", "absmax1", "absmax2")
        )


def trained(shard: bool, invariant: bool, optim: str) -> dict[str, Any]:
    """Four steps, the state put into a new optimizer of the other kind, and two more."""
    run = Trained(shard, invariant, optim)
    figures = [run.step(step) for step in range(4)]
    run.state.require_finite(4)
    saved = [run.state.gather()]
    dist.broadcast_object_list(saved, src=0)  # as the other ranks would read it from the file
    resumed = Trained(not shard, invariant, optim)
    resumed.flat.values.data.copy_(run.flat.values.data)
    resumed.state.load(saved[0], "here")
    with recorded_collectives() as sent:
        figures += [resumed.step(step) for step in range(4, 6)]
    return {
        "figures": figures,
        "state": saved[0],
        "values": resumed.flat.values.detach().clone(),
        "moments": run.moments(),
        "sent": [(name, size) for _, name, size in sent],
        "buffer": resumed.flat.bytes_per_reduction,
    }


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(("invariant", "optim"), [(False, "adamw"), (True, "adamw"), (True, "8 bits")])
def test_spread_is_the_same_training(pools, world, invariant, optim):
    spread = pools[world].run(trained, shard=True, invariant=invariant, optim=optim)
    whole = pools[world].run(trained, shard=False, invariant=invariant, optim=optim)
    for found in spread:
        assert torch.equal(found["values"], spread[0]["values"]), "ranks differ in a bit"
        assert found["moments"] * world <= 1.02 * whole[0]["moments"]
        assert found["state"].keys() == whole[0]["state"].keys()
        if invariant:
            assert found["figures"] == whole[0]["figures"]
            assert torch.equal(found["values"], whole[0]["values"])
            assert all(torch.equal(found["state"][key], tensor) for key, tensor in whole[0]["state"].items())
        else:
            losses = [[loss for loss, _ in each["figures"]] for each in (found, whole[0])]
            assert losses[0] == pytest.approx(losses[1], rel=1e-6)
            torch.testing.assert_close(found["values"], whole[0]["values"], rtol=1e-4, atol=1e-6)
    # The resumed half of `whole` was spread: each part of the buffer leaves once, each value comes back once.
    sent = [pool[0]["sent"] for pool in (spread, whole)]
    moved = [{name: sum(size for each, size in log if each == name) for name, _ in log} for log in sent]
    if not invariant:
        assert moved[0].keys() == {"allreduce"}
        exchanged, gathered = moved[1]["alltoall_base"], moved[1]["_allgather_base".strip("_")]
        assert 2 * moved[0]["allreduce"] == pytest.approx(exchanged + gathered + 2 * moved[1]["allreduce"], rel=0.01)
