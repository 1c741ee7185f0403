"""Rows of answers that are compared: two for each sample, the first ones before all second ones.

A pair's rows are the better answer and the other one. A rated answer's second row is another answer of the micro-batch
behind its own prompt, on which KTO measures how far the model has drifted; with the kind `rated` there is none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import numpy as np
import torch

from dist_qft.data.dataset import Row, TokenDataset


@dataclass(frozen=True)
class Answers:
    """The meaning of a micro-batch's 2b rows.

    Attributes:
        count: pairs or rated answers: rows i and b + i are those of the i-th, rows from `count` on only fill up.
        in_answer: (targets,) bool, False for the tokens of a prompt that are predicted as well.
        share: terms of the step per token that is predicted of better answers with their prompts: its weight.
        desirable: (count,) bool of rated answers.
        cycled: second rows that hold another sample's answer.
        first_targets: targets of the first rows, which come before all others.
    """

    count: int
    in_answer: torch.Tensor
    share: float = 1.0
    desirable: torch.Tensor | None = None
    cycled: int = 0
    first_targets: int | None = None

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """The same with its tensors moved."""
        desirable = None if self.desirable is None else move(self.desirable)
        return replace(self, in_answer=move(self.in_answer), desirable=desirable)


class ComparedRows(NamedTuple):
    """The first and the second rows of some samples, and the further fields of `Answers`."""

    first: list[Row]
    second: list[Row]
    with_prompts: bool
    cycled: int


def compared_rows(dataset: TokenDataset, row_ids: Sequence[int]) -> ComparedRows:
    """The rows of the samples with these ids."""
    rows = [dataset.row(row_id) for row_id in row_ids]
    if dataset.kind == "rated":
        return ComparedRows(rows, [], False, 0)
    if dataset.kind == "rated-with-kl":
        cycled = [_behind(row, other) for row, other in zip(rows, _answers_to_others(rows), strict=False)]
        return ComparedRows(rows, cycled, False, len(cycled))
    halves = [_halves(row) for row in rows]
    with_prompts = dataset.kind == "pairs-with-prompts"
    return ComparedRows([first for first, _ in halves], [second for _, second in halves], with_prompts, 0)


def prompt_share(dataset: TokenDataset, row_ids: Sequence[int]) -> float:
    """Pairs per predicted token of their better answers with prompts, over the rows of a whole step.

    Known to every rank beforehand, so that two means, over tokens and over pairs, fit into one sum.
    """
    if dataset.kind != "pairs-with-prompts" or not row_ids:
        return 1.0
    ids = np.asarray(row_ids)
    lengths = dataset.segment_starts[2 * ids + 1] - dataset.segment_starts[2 * ids]
    return len(ids) / max(int((lengths - 1).sum()), 1)


def _halves(row: Row) -> tuple[Row, Row]:
    _, second = row.segment_starts
    begin = row.segment_starts[:1]
    return (
        Row(row.tokens[:second], row.targets[:second], begin),
        Row(row.tokens[second:], row.targets[second:], begin),
    )


def _answers_to_others(rows: Sequence[Row]) -> list[Row]:
    """For each row the nearest one before it, in a circle, that answers another prompt; empty if none does.

    An answer behind its own prompt would measure its own reward, and so would another one behind the same prompt.
    """
    prompts = [row.tokens[: int(np.argmax(row.targets))].tobytes() for row in rows]
    if len(set(prompts)) < 2:
        return []
    nearest = [next(k for k in range(1, len(rows)) if prompts[i - k] != prompts[i]) for i in range(len(rows))]
    return [rows[i - k] for i, k in enumerate(nearest)]


def _behind(row: Row, other: Row) -> Row:
    """The answer of `other` behind the prompt of `row`, no longer than the longer of both."""
    start, answer = int(np.argmax(row.targets)), int(np.argmax(other.targets))
    limit = max(len(row.tokens), len(other.tokens))
    tokens = np.concatenate([row.tokens[:start], other.tokens[answer:]])[:limit]
    targets = np.concatenate([np.zeros(start, dtype=bool), other.targets[answer:]])[:limit]
    return Row(tokens, targets, row.segment_starts)
