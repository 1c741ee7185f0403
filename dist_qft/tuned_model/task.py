"""The tasks of a tuned model: the next token, or a label for a whole text. `preference` has those that compare answers.

A task turns last hidden states into a loss summed over its terms: targets, or pairs. Predicting labels (the GLUE
benchmark's way, the QST paper's main table) needs a head of its own, which trains with the rest; it reads the last
token of each row that is not padding.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_qft.base_model.loss import loss_at
from dist_qft.base_model.skeleton import BaseModel
from dist_qft.config.data_schema import TaskConfig
from dist_qft.data.batches import MicroBatch
from dist_qft.methods.trainable import TrainableSpec, copy_tensors

HEAD = "score"  # the name of a task's head among the trainables


class TaskLoss(NamedTuple):
    """The outcome of a micro-batch.

    loss: summed over its terms, a float32 scalar. predicted: (b,) float32 on the device, with NaN for rows that only
    fill up; None without labels. sums: (n,) float32, what `Task.figures` is made of; None if there are none.
    """

    loss: Tensor
    predicted: Tensor | None = None
    sums: Tensor | None = None


class Task(Protocol):
    """The last stage of a forward pass. A micro-batch is on the device of the states.

    Attributes:
        sums: how many numbers `loss` sums up for `figures`.
        needs_base: the loss compares the tuned model with the base, which is run beside it.
    """

    @property
    def sums(self) -> int: ...

    @property
    def needs_base(self) -> bool: ...

    def named_tensors(self) -> list[tuple[str, nn.Parameter]]:
        """The task's own trainables, fp32."""

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy values into them."""

    def loss(self, hidden: Tensor, batch: MicroBatch) -> TaskLoss:
        """Loss summed over the batch's terms, from last hidden states (b, L, D), differentiable by them."""

    def metrics(self, predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Figures on predicted labels."""

    def figures(self, sums: Sequence[float], terms: int) -> dict[str, float]:
        """Figures by name, from the sums over so many terms."""

    def untrained(self) -> AbstractContextManager[None]:
        """Context in which the task's own trainables are as they begin."""

    def detach(self) -> None:
        """Leave the base as it was."""


def head_outputs(config: TaskConfig) -> int:
    """Rows of the head that the task trains; 0 if it has none."""
    return {"classification": len(config.labels), "regression": 1}.get(config.name, 0)


def head_parameters(config: TaskConfig, base: BaseModel) -> int:
    """Parameters of the head that the task trains; 0 if it has none."""
    return head_outputs(config) * base.embedding.embedding_dim


def trainable_names(config: TaskConfig, spec: TrainableSpec[Any]) -> list[str]:
    """The names of all trainables of a run, in the order of its flat buffer: the method's, and the task's head."""
    return [*spec.names(), *([HEAD] if head_outputs(config) else [])]


class LanguageTask:
    """Base class of tasks that read the base's frozen head and train nothing of their own."""

    sums = 0
    needs_base = False

    def __init__(self, base: BaseModel) -> None:
        self.base = base

    def named_tensors(self) -> list[tuple[str, nn.Parameter]]:
        """Nothing."""
        return []

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Refuse any tensor."""
        copy_tensors({}, tensors)

    def metrics(self, predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Nothing."""
        return {}

    def figures(self, sums: Sequence[float], terms: int) -> dict[str, float]:
        """Nothing."""
        return {}

    def untrained(self) -> AbstractContextManager[None]:
        """Nothing to change."""
        return nullcontext()

    def detach(self) -> None:
        """Do nothing."""


class CausalLM(LanguageTask):
    """Cross entropy of each target token."""

    def loss(self, hidden: Tensor, batch: MicroBatch) -> TaskLoss:
        """See `Task`."""
        return TaskLoss(loss_at(hidden, batch.target_positions, batch.target_ids, self.base.head.loss))


class Labelling(nn.Module):
    """A linear head (outputs, D) on each row's last token: cross entropy over labels, or squared error of a number.

    It starts at zero, so that every label is equally likely at first, for every seed.
    """

    sums = 0
    needs_base = False

    def __init__(self, outputs: int, width: int, *, regression: bool) -> None:
        super().__init__()
        self.score = nn.Parameter(torch.zeros(outputs, width))
        self.regression = regression

    def named_tensors(self) -> list[tuple[str, nn.Parameter]]:
        return [(HEAD, self.score)]

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        copy_tensors(dict(self.named_tensors()), tensors)

    def loss(self, hidden: Tensor, batch: MicroBatch) -> TaskLoss:
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
        return TaskLoss(loss, predicted)

    def figures(self, sums: Sequence[float], terms: int) -> dict[str, float]:
        return {}

    @contextmanager
    def untrained(self) -> Iterator[None]:
        trained = self.score.detach().clone()
        with torch.no_grad():
            self.score.zero_()
        try:
            yield
        finally:
            with torch.no_grad():
                self.score.copy_(trained)

    def detach(self) -> None:
        pass

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
