"""The tasks of a tuned model: the next token, or a label for a whole text.

A task turns last hidden states into a loss summed over targets. Predicting labels (the GLUE benchmark's way, the QST
paper's main table) needs a head of its own, which trains with the rest; it reads the last token of each row that is
not padding.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_qft.base_model.loss import loss_at
from dist_qft.base_model.skeleton import BaseModel
from dist_qft.config.data_schema import TaskConfig
from dist_qft.data.batches import MicroBatch
from dist_qft.methods.trainable import copy_tensors


class Task(Protocol):
    """The last stage of a forward pass. A micro-batch is on the device of the states."""

    def named_tensors(self) -> list[tuple[str, nn.Parameter]]:
        """The task's own trainables, fp32."""

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy values into them."""

    def loss(self, hidden: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor | None]:
        """Loss summed over the batch's targets, from last hidden states (b, L, D), differentiable by them.

        Also the predictions, (b,) float32 on the device with NaN for rows that only fill up; None for tokens.
        """

    def metrics(self, predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Figures on predicted labels."""


def make_task(config: TaskConfig, base: BaseModel, device: torch.device) -> Task:
    """The task of a run on this base."""
    outputs = head_outputs(config)
    if outputs == 0:
        return CausalLM(base)
    return Labelling(outputs, base.embedding.embedding_dim, regression=config.name == "regression").to(device)


def head_outputs(config: TaskConfig) -> int:
    """Rows of the head that the task trains; 0 if it has none."""
    return {"causal-lm": 0, "classification": len(config.labels), "regression": 1}[config.name]


@dataclass(frozen=True)
class CausalLM:
    """Cross entropy of each target token, by the base's frozen head."""

    base: BaseModel

    def named_tensors(self) -> list[tuple[str, nn.Parameter]]:
        return []

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        copy_tensors({}, tensors)

    def loss(self, hidden: Tensor, batch: MicroBatch) -> tuple[Tensor, None]:
        return loss_at(hidden, batch.target_positions, batch.target_ids, self.base.head.loss), None

    def metrics(self, predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return {}


class Labelling(nn.Module):
    """A linear head (outputs, D) on each row's last token: cross entropy over labels, or squared error of a number.

    It starts at zero, so that every label is equally likely at first, for every seed.
    """

    def __init__(self, outputs: int, width: int, *, regression: bool) -> None:
        super().__init__()
        self.score = nn.Parameter(torch.zeros(outputs, width))
        self.regression = regression

    def named_tensors(self) -> list[tuple[str, nn.Parameter]]:
        return [("score", self.score)]

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        copy_tensors(dict(self.named_tensors()), tensors)

    def loss(self, hidden: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        rows = batch.target_positions // hidden.shape[1]
        scores = F.linear(hidden.flatten(0, 1)[batch.target_positions].float(), self.score)
        labels = labels_of(batch)
        if self.regression:
            best = scores.squeeze(1)
            loss = F.mse_loss(best, labels, reduction="sum")
        else:
            best = scores.argmax(1).float()
            loss = F.cross_entropy(scores, labels.long(), reduction="sum")
        predicted = best.new_full((hidden.shape[0],), torch.nan)
        predicted[rows] = best.detach()
        return loss, predicted

    def metrics(self, predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Pearson correlation of numbers; accuracy, Matthews correlation and F1 of labels."""
        if self.regression:
            return {"pearson": _correlation(predicted, labels)}
        count = self.score.shape[0]
        table = np.zeros((count, count))  # [true, predicted]
        np.add.at(table, (labels.astype(int), predicted.astype(int)), 1)
        return {"accuracy": float(np.trace(table) / table.sum()), "matthews": _matthews(table), "f1": _f1(table)}


def labels_of(batch: MicroBatch) -> Tensor:
    """The labels of a micro-batch of labelled rows, (rows,) float32."""
    if batch.labels is None:
        raise ValueError("the micro-batch has no labels")
    return batch.labels


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's r; 0 if one side never changes."""
    if first.std() == 0 or second.std() == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def _matthews(table: np.ndarray) -> float:
    """Matthews' correlation for any number of labels (Gorodkin's R_K); 0 if one side has a single label."""
    total, correct = table.sum(), np.trace(table)
    true, predicted = table.sum(1), table.sum(0)
    spread = np.sqrt((total**2 - (predicted**2).sum()) * (total**2 - (true**2).sum()))
    return float((correct * total - (true * predicted).sum()) / spread) if spread else 0.0


def _f1(table: np.ndarray) -> float:
    """F1 of the second of two labels, as GLUE has it; of more labels the mean over them."""
    sums = table.sum(0) + table.sum(1)
    scores = np.divide(2 * np.diag(table), sums, out=np.zeros(len(table)), where=sums > 0)
    return float(scores[1] if len(table) == 2 else scores.mean())
