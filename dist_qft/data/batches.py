"""The order of rows, and the micro-batches that one rank takes of it.

Everything is a pure function of (seed, epoch, global position): nothing is shuffled in place and nothing is stored, so
a run resumes at any step, on any number of ranks, with the rows it would have had.

Step s takes the global positions [s G, (s + 1) G), where G is the global batch size, cut into micro-batches of m rows.
Micro-batch j of a step is the same on every world size; rank r of W takes the accumulation steps
j in [r a, (r + 1) a), where a = G / (m W).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch

from dist_qft.data.answer_rows import Answers, compared_rows, prompt_share
from dist_qft.data.dataset import Row, TokenDataset
from dist_qft.data.mixture import RowOrder
from dist_qft.data.samples import IGNORED
from dist_qft.data.segments import Segments

PAD_MULTIPLE = 8  # row lengths are rounded up to it: matrix kernels like it


@dataclass(frozen=True)
class MicroBatch:
    """b rows of L tokens, padded on the right; all int64.

    Causal attention needs no mask besides the segments; the model is to be called with `use_cache=False` (`packing`).
    Whatever follows from values is computed here, on the CPU: to ask a GPU for it would make the host wait.

    Attributes:
        input_ids: (b, L).
        position_ids: (b, L), restarting with each segment of a packed row.
        segments: where the segments of all rows lie.
        target_positions: (n,), the positions that have something to predict, in all rows one behind the other.
        target_ids: (n,), what they have to predict: the token behind each.
        num_targets: n.
        index: the micro-batch's place within its step (or within the evaluation) over all ranks.
        row_ids: the data set's rows, fewer than b if it was filled up.
        labels: (rows,) float32 of labelled rows; their one target, at the last token, is 0 and only marks the place.
        answers: of rows that hold answers to be compared or rated, one or two for each sample (see `answer_rows`).
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segments: Segments
    target_positions: torch.Tensor
    target_ids: torch.Tensor
    index: int
    row_ids: tuple[int, ...] = ()
    labels: torch.Tensor | None = None
    answers: Answers | None = None

    @classmethod
    def of(
        cls,
        input_ids: torch.Tensor,
        targets: torch.Tensor,
        position_ids: torch.Tensor,
        index: int,
        row_ids: tuple[int, ...] = (),
        labels: torch.Tensor | None = None,
        answers: Answers | None = None,
    ) -> Self:
        """From targets (b, L), already shifted: the token that position t has to predict, or -100. All on the CPU."""
        positions = (targets.flatten() != IGNORED).nonzero().squeeze(1)
        ids, segments = targets.flatten()[positions], Segments.of(position_ids)
        return cls(input_ids, position_ids, segments, positions, ids, index, row_ids, labels, answers)

    @property
    def num_targets(self) -> int:
        return len(self.target_ids)

    @property
    def num_terms(self) -> int:
        """Terms of the loss, by which its sum is divided: targets, or pairs, or rated answers."""
        return self.num_targets if self.answers is None else self.answers.count

    @property
    def targets(self) -> torch.Tensor:
        """(b, L): what each position has to predict, -100 where that is nothing."""
        targets = torch.full_like(self.input_ids, IGNORED)
        targets.view(-1)[self.target_positions] = self.target_ids
        return targets

    def to(self, device: torch.device) -> Self:
        """The same on a device. Out of pinned memory the copies are only launched; nothing waits for them."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True), self.segments.to(device))

    def pinned(self) -> Self:
        """The same in page-locked memory."""
        return self._with(torch.Tensor.pin_memory, self.segments.pinned())

    def _with(self, move: Callable[[torch.Tensor], torch.Tensor], segments: Segments) -> Self:
        return replace(
            self,
            input_ids=move(self.input_ids),
            position_ids=move(self.position_ids),
            segments=segments,
            target_positions=move(self.target_positions),
            target_ids=move(self.target_ids),
            labels=None if self.labels is None else move(self.labels),
            answers=None if self.answers is None else self.answers.moved(move),
        )


class Batches:
    """Training micro-batches of rank `rank` of `world_size`, for `total_rows` rows in all.

    A row is one sample, or with packing several.

    `mixture` has the row at each global position. The last step is filled up with empty rows without
    targets, so that every rank runs the same number of forward passes.

    The global batch divides into micro-batches of every rank: `accumulation_steps` refuses any other.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        total_rows: int,
    ) -> None:
        per_round = micro_batch_size * world_size
        assert global_batch_size % per_round == 0, "accumulation_steps has refused such a batch"
        self.dataset = dataset
        self._order = RowOrder(seed, len(dataset), dataset.mixture)
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.accumulation = global_batch_size // per_round
        self.rank = rank
        self.total_rows = total_rows

    def __len__(self) -> int:
        """Optimizer steps."""
        return -(-self.total_rows // self.global_batch_size)

    def row_ids(self, step: int) -> list[int]:
        """The rows of `step` over all ranks, in global order; what the data hash chain covers."""
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        first = step * self.global_batch_size
        return [self._order[p] for p in range(first, min(first + self.global_batch_size, self.total_rows))]

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of `step`: `accumulation` of them, in order."""
        row_ids = self.row_ids(step)
        size = self.micro_batch_size
        indices = range(self.rank * self.accumulation, (self.rank + 1) * self.accumulation)
        share = prompt_share(self.dataset, row_ids)
        return [collate(self.dataset, row_ids[j * size : (j + 1) * size], size, j, share) for j in indices]


def eval_batches(dataset: TokenDataset, micro_batch_size: int, rank: int, world_size: int) -> list[MicroBatch]:
    """This rank's share of every row once; all ranks get equally many micro-batches, filled up with empty rows.

    Rows are dealt by length: neighbours pad each other little, and the ranks finish together.
    """
    by_length = np.argsort(-dataset.lengths, kind="stable").tolist()
    rounds = -(-len(by_length) // (micro_batch_size * world_size))
    indices = range(rank, rounds * world_size, world_size)
    share = prompt_share(dataset, by_length)
    return [
        collate(dataset, by_length[j * micro_batch_size : (j + 1) * micro_batch_size], micro_batch_size, j, share)
        for j in indices
    ]


def collate(dataset: TokenDataset, row_ids: list[int], num_rows: int, index: int, share: float = 1.0) -> MicroBatch:
    """The given rows, and as many empty ones (padding alone) as make `num_rows`, as one micro-batch.

    `share` is `prompt_share` of all rows of the step.
    """
    if dataset.kind not in ("tokens", "labels"):
        return _collate_answers(dataset, row_ids, num_rows, index, share)
    rows = [dataset.row(row_id) for row_id in row_ids]
    longest = max((len(row.tokens) for row in rows), default=1)
    length = dataset.packed_length or -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE
    input_ids = np.full((num_rows, length), dataset.pad_id, dtype=np.int64)
    targets = np.full((num_rows, length), IGNORED, dtype=np.int64)
    position_ids = np.tile(np.arange(length, dtype=np.int64), (num_rows, 1))
    for i, row in enumerate(rows):
        size = len(row.tokens)
        input_ids[i, :size] = row.tokens
        if dataset.kind == "labels":
            targets[i, size - 1] = 0
        else:
            # A segment's first token is never a target, which alone keeps the shift from crossing segments.
            targets[i, : size - 1] = np.where(row.targets[1:], row.tokens[1:], IGNORED)
        if dataset.packed_length is not None:
            position_ids[i] = _packed_positions(row, length)
    return MicroBatch.of(
        torch.from_numpy(input_ids),
        torch.from_numpy(targets),
        torch.from_numpy(position_ids),
        index,
        row_ids=tuple(row_ids),
        labels=None if dataset.labels is None else torch.from_numpy(dataset.labels[row_ids]),
    )


def _collate_answers(dataset: TokenDataset, row_ids: list[int], num_rows: int, index: int, share: float) -> MicroBatch:
    """Two rows for each sample, or one: see `answer_rows`."""
    compared = compared_rows(dataset, row_ids)
    longest = max((len(row.tokens) for row in [*compared.first, *compared.second]), default=1)
    length = -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE
    shape = num_rows if dataset.kind == "rated" else 2 * num_rows, length
    input_ids = np.full(shape, dataset.pad_id, dtype=np.int64)
    targets = np.full(shape, IGNORED, dtype=np.int64)
    in_answer = np.zeros(shape, dtype=bool)
    for start, rows in ((0, compared.first), (num_rows, compared.second)):
        for i, row in enumerate(rows, start):
            size = len(row.tokens)
            input_ids[i, :size] = row.tokens
            in_answer[i, : size - 1] = row.targets[1:]
            # The prompt of an answer that is to be preferred may be trained on, too.
            predicted = True if compared.with_prompts and start == 0 else row.targets[1:]
            targets[i, : size - 1] = np.where(predicted, row.tokens[1:], IGNORED)
    labels = None if dataset.labels is None else torch.from_numpy(dataset.labels[row_ids] > 0)
    of_answers = torch.from_numpy(in_answer[targets != IGNORED])
    first_targets = int((targets[:num_rows] != IGNORED).sum())
    answers = Answers(len(row_ids), of_answers, share, labels, compared.cycled, first_targets)
    positions = torch.arange(length).repeat(shape[0], 1)
    tensors = torch.from_numpy(input_ids), torch.from_numpy(targets), positions
    return MicroBatch.of(*tensors, index, tuple(row_ids), answers=answers)


def _packed_positions(row: Row, length: int) -> np.ndarray:
    """(length,) int64 that restarts at 0 with each segment; the padding is a segment of its own."""
    borders = np.append(row.segment_starts, [len(row.tokens), length])
    return np.arange(length) - np.repeat(borders[:-1], np.diff(borders))
