"""Held-out loss: every row once, over all ranks, with the adapter and without it."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from dist_qft.assemble import assemble, compute_dtype, plan_trainables
from dist_qft.base_model.skeleton import BaseModel, build_skeleton
from dist_qft.checkpoint import list_checkpoints
from dist_qft.collectives import told_by
from dist_qft.config.schema import RunConfig
from dist_qft.data.batches import MicroBatch, eval_batches
from dist_qft.data.prepare import prepare
from dist_qft.errors import UserError
from dist_qft.loss import token_loss
from dist_qft.tokenizer import load_tokenizer
from dist_qft.trained import find_checkpoint, open_trained
from dist_qft.world import World, connect, device_for


@dataclass(frozen=True)
class HeldOut:
    """Mean cross entropy (nats) per target token."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


@torch.no_grad()
def held_out_loss(base: BaseModel, batches: list[MicroBatch], device: torch.device) -> HeldOut:
    """Loss over this rank's `batches` and everybody else's. Collective: equal numbers of batches on all ranks."""
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        hidden = base.hidden_states(batch.input_ids.to(device), batch.position_ids.to(device))
        sums[0] += token_loss(hidden, batch.targets.to(device), base.head.loss)
        sums[1] += batch.num_targets
    dist.all_reduce(sums)
    loss, tokens = sums.tolist()
    return HeldOut(loss / max(tokens, 1), int(tokens))


def run_evaluation(config: RunConfig, checkpoint_path: str | None, as_json: bool) -> None:
    """Print held-out loss and perplexity of the base and, if there is a checkpoint, of the tuned model.

    The checkpoint is the one given, or the newest in `output_dir`, or none: then the base alone is evaluated.

    Raises:
        UserError: the config names no held-out data, or the adapter belongs to another base.
    """
    if config.data is None or (config.data.eval is None and not config.data.eval_samples):
        raise UserError("data.eval: there is no held-out data; set data.eval or data.eval_samples")
    path = checkpoint_path or (config.output_dir if list_checkpoints(Path(config.output_dir)) else None)
    checkpoint = find_checkpoint(path) if path else None
    world = World.from_environment()
    device = device_for(world, config.sharding.device)
    skeleton = build_skeleton(config.model, config.quantization, compute_dtype(config.train.precision, device))
    cache_dir = Path(config.data.cache_dir or Path(config.output_dir) / "data_cache")
    data = prepare(config.data, load_tokenizer(config.model), skeleton.vocab_size, cache_dir)
    with (
        connect(world, device, config.sharding.timeout_seconds),
        told_by(world.rank, lambda: "evaluation"),
    ):
        if checkpoint is None:
            parts = assemble(config, skeleton, plan_trainables(config, skeleton), device)
        else:
            parts, _ = open_trained(checkpoint, config, device)
        micro = config.train.per_device_train_batch_size
        batches = eval_batches(data.eval, micro, world.rank, world.world_size)
        with parts.adapters.disabled():
            results = {"base": held_out_loss(parts.base, batches, device)}
        if checkpoint is not None:
            results["tuned"] = held_out_loss(parts.base, batches, device)
    if world.rank == 0:
        _print(results, str(checkpoint.path) if checkpoint else None, as_json)


def _print(results: dict[str, HeldOut], checkpoint: str | None, as_json: bool) -> None:
    if as_json:
        table = {
            which: {"loss": held_out.loss, "perplexity": held_out.perplexity, "tokens": held_out.tokens}
            for which, held_out in results.items()
        }
        print(json.dumps({"checkpoint": checkpoint, **table}, indent=1))
        return
    for which, held_out in results.items():
        source = f" ({checkpoint})" if which == "tuned" else ""
        print(f"{which:6} loss {held_out.loss:.4f}  perplexity {held_out.perplexity:.3f}{source}")
