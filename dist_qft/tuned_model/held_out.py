"""Held-out loss and metrics of an assembled model: every row once, over all ranks."""

import math
import time
from dataclasses import astuple, dataclass, field, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dist_qft.base_model.skeleton import BaseModel
from dist_qft.data.batches import MicroBatch
from dist_qft.errors import NumericError, Preempted
from dist_qft.methods.forward import BaseForward
from dist_qft.ranks.collectives import gather_table
from dist_qft.ranks.preemption import StopSignal
from dist_qft.tuned_model.task import CausalLM, Task, labels_of


@dataclass(frozen=True)
class RowScore:
    """The score of one held-out row: its loss summed over its targets; prediction and label of a labelled row."""

    loss: float
    targets: int
    predicted: float | None = None
    label: float | None = None


@dataclass(frozen=True)
class HeldOut:
    """Mean loss (nats; squared error of a regression) per term: a token, a labelled row, a pair or a rated answer.

    Attributes:
        tokens: their number.
        metrics: of predicted labels and of answers; empty for tokens.
        rows: the score of every row of the data by its place there, if they were asked for.
        seconds: that the evaluation took.
    """

    loss: float
    tokens: int
    metrics: dict[str, float] = field(default_factory=dict)
    rows: dict[int, RowScore] = field(default_factory=dict)
    seconds: float = field(default=0.0, compare=False)

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
    *,
    keep_rows: bool = False,
) -> HeldOut:
    """Loss over this rank's `batches` and everybody else's. Collective: equal numbers of batches on all ranks.

    Args:
        task: default is to predict tokens.
        keep_rows: also score every row by itself, which runs the head once more; not of answers that are compared.

    Raises:
        NumericError: on all ranks, if the loss is not finite.
        Preempted: some rank was asked to `stop`.
    """
    started = time.perf_counter()
    task = task or CausalLM(base)
    forward = BaseForward(base, device)
    sums = torch.zeros(2 + task.sums, dtype=torch.float64, device=device)
    predictions: list[Tensor] = []
    labels: list[Tensor] = []
    rows: dict[int, RowScore] = {}
    for batch in batches:
        if stop is not None and stop.any_rank():
            raise Preempted("stopped by a signal during an evaluation")
        batch = batch.to(device)
        hidden = forward(batch)
        loss, predicted, others = task.loss(hidden, batch)
        if keep_rows and batch.answers is None:
            rows |= _row_scores(task, hidden, batch)
        sums[0] += loss
        sums[1] += batch.num_terms
        if others is not None:
            sums[2:] += others
        if predicted is not None:
            predictions.append(predicted)
            found = labels_of(batch)
            labels.append(torch.full_like(predicted, torch.nan))
            labels[-1][: len(found)] = found
    dist.all_reduce(sums)
    loss, terms, *totals = sums.tolist()
    if not math.isfinite(loss):
        raise NumericError(f"held-out loss is {loss}: the model's values or outputs are not finite")
    metrics = _metrics(task, torch.cat(predictions), torch.cat(labels)) if predictions else {}
    everywhere = _all_rows(rows, device) if keep_rows else {}
    metrics |= task.figures(totals, int(terms))
    return HeldOut(loss / max(terms, 1), int(terms), metrics, everywhere, time.perf_counter() - started)


def _row_scores(task: Task, hidden: Tensor, batch: MicroBatch) -> dict[int, RowScore]:
    """The score of each row of a micro-batch. A row that only fills up takes part, since a sharded head is gathered."""
    length, found = hidden.shape[1], {}
    row_of_target = batch.target_positions // length
    for row in range(hidden.shape[0]):
        own = row_of_target == row
        row_id = batch.row_ids[row] if row < len(batch.row_ids) else None
        labels = None if batch.labels is None else batch.labels[row : row + 1]
        part = replace(
            batch, target_positions=batch.target_positions[own], target_ids=batch.target_ids[own], labels=labels
        )
        loss, predicted, _ = task.loss(hidden, part)
        if row_id is not None:
            label = None if labels is None else float(labels)
            guess = None if predicted is None else float(predicted[row])
            found[row_id] = RowScore(float(loss), part.num_targets, guess, label)
    return found


def _all_rows(rows: dict[int, RowScore], device: torch.device) -> dict[int, RowScore]:
    """The rows of all ranks, in the order of the data. Collective."""
    own = {row: [math.nan if value is None else float(value) for value in astuple(rows[row])] for row in rows}
    everyone = gather_table(own, 4, device)
    return {
        row: RowScore(loss, int(targets), *(None if math.isnan(value) else value for value in labelled))
        for row, (loss, targets, *labelled) in everyone.items()
    }


def _metrics(task: Task, predicted: Tensor, labels: Tensor) -> dict[str, float]:
    """Metrics over all ranks' rows; rows that only fill up are NaN. Collective."""
    own = torch.stack([predicted, labels])
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, own)
    pairs = torch.cat(everyone, dim=1).double().cpu().numpy()
    return task.metrics(*pairs[:, ~np.isnan(pairs[1])])
