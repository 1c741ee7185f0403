"""Held-out loss and metrics of an assembled model: every row once, over all ranks."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dist_qft.base_model.skeleton import BaseModel
from dist_qft.data.batches import MicroBatch
from dist_qft.errors import NumericError, Preempted
from dist_qft.methods.forward import BaseForward
from dist_qft.ranks.preemption import StopSignal
from dist_qft.tuned_model.task import CausalLM, Task, labels_of


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
        """Figures to show beside the loss: the metrics, or for tokens the perplexity."""
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
        NumericError: on all ranks, if the loss is not finite.
        Preempted: some rank was asked to `stop`.
    """
    task = task or CausalLM(base)
    forward = BaseForward(base, device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    predictions: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in batches:
        if stop is not None and stop.any_rank():
            raise Preempted("stopped by a signal during an evaluation")
        batch = batch.to(device)
        loss, predicted = task.loss(forward(batch), batch)
        sums[0] += loss
        sums[1] += batch.num_targets
        if predicted is not None:
            predictions.append(predicted)
            found = labels_of(batch)
            labels.append(torch.full_like(predicted, torch.nan))
            labels[-1][: len(found)] = found
    dist.all_reduce(sums)
    loss, tokens = sums.tolist()
    if not math.isfinite(loss):
        raise NumericError(f"held-out loss is {loss}: the model's values or outputs are not finite")
    metrics = _metrics(task, torch.cat(predictions), torch.cat(labels)) if predictions else {}
    return HeldOut(loss / max(tokens, 1), int(tokens), metrics)


def _metrics(task: Task, predicted: Tensor, labels: Tensor) -> dict[str, float]:
    """Metrics over all ranks' rows; rows that only fill up are NaN. Collective."""
    own = torch.stack([predicted, labels])
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, own)
    pairs = torch.cat(everyone, dim=1).double().cpu().numpy()
    return task.metrics(*pairs[:, ~np.isnan(pairs[1])])
