"""Held-out loss and metrics: every row once, over all ranks, with the adapter and without it."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dist_qft.assemble import assemble
from dist_qft.base_model.skeleton import BaseModel, build_skeleton
from dist_qft.base_model.tokenizer import load_tokenizer
from dist_qft.config.schema import RunConfig
from dist_qft.data.batches import MicroBatch, eval_batches
from dist_qft.data.prepare import prepare
from dist_qft.errors import Preempted, UserError
from dist_qft.methods.forward import BaseForward
from dist_qft.methods.plans import plan_trainables
from dist_qft.ranks.collectives import told_by
from dist_qft.ranks.device import compute_dtype, device_for
from dist_qft.ranks.preemption import StopSignal
from dist_qft.ranks.world import World, connect
from dist_qft.storage.checkpoint import list_checkpoints
from dist_qft.task import CausalLM, Task
from dist_qft.trained import find_checkpoint, open_trained


@dataclass(frozen=True)
class HeldOut:
    """Mean loss (nats; squared error of a regression) per target: a token, or a labelled row.

    metrics: of predicted labels; empty for tokens.
    """

    loss: float
    tokens: int
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def figures(self) -> dict[str, float]:
        """What to show beside the loss: the metrics, or for tokens the perplexity."""
        return self.metrics or {"perplexity": self.perplexity}


@torch.no_grad()
def held_out_loss(
    base: BaseModel,
    batches: list[MicroBatch],
    device: torch.device,
    task: Task | None = None,
    stop: StopSignal | None = None,
) -> HeldOut:
    """Loss over this rank's `batches` and everybody else's. Collective: equal numbers of batches on all ranks.

    task: default is to predict tokens.

    Raises:
        Preempted: some rank was asked to `stop`.
    """
    task = task or CausalLM(base)
    forward = BaseForward(base, device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    predictions, labels = [], []
    for batch in batches:
        if stop is not None and stop.agreed():
            raise Preempted("stopped by a signal during an evaluation")
        loss, predicted = task.loss(forward(batch), batch)
        sums[0] += loss
        sums[1] += batch.num_targets
        if predicted is not None:
            predictions.append(predicted)
            labels.append(torch.full_like(predicted, torch.nan))
            labels[-1][: len(batch.labels)] = batch.labels.to(device)
    dist.all_reduce(sums)
    loss, tokens = sums.tolist()
    metrics = _metrics(task, torch.cat(predictions), torch.cat(labels)) if predictions else {}
    return HeldOut(loss / max(tokens, 1), int(tokens), metrics)


def _metrics(task: Task, predicted: Tensor, labels: Tensor) -> dict[str, float]:
    """Metrics over all ranks' rows; rows that only fill up are NaN. Collective."""
    own = torch.stack([predicted, labels])
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, own)
    pairs = torch.cat(everyone, dim=1).double().cpu().numpy()
    return task.metrics(*pairs[:, ~np.isnan(pairs[1])])


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
    data = prepare(config.data, load_tokenizer(config.model), skeleton.vocab_size, cache_dir, config.task)
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
            results = {"base": held_out_loss(parts.base, batches, device, parts.task)}
        if checkpoint is not None:
            results["tuned"] = held_out_loss(parts.base, batches, device, parts.task)
    if world.rank == 0:
        _print(results, str(checkpoint.path) if checkpoint else None, as_json)


def _print(results: dict[str, HeldOut], checkpoint: str | None, as_json: bool) -> None:
    if as_json:
        table = {
            which: {"loss": held_out.loss, **held_out.figures, "tokens": held_out.tokens}
            for which, held_out in results.items()
        }
        print(json.dumps({"checkpoint": checkpoint, **table}, indent=1))
        return
    for which, held_out in results.items():
        source = f" ({checkpoint})" if which == "tuned" else ""
        figures = "".join(f"  {name} {value:.3f}" for name, value in held_out.figures.items())
        print(f"{which:6} loss {held_out.loss:.4f}{figures}{source}")
