"""Limits on a sample's length, in tokens."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from dist_qft.data.records import RowError
from dist_qft.data.tokens import TokenSequence


@dataclass(frozen=True)
class Lengths:
    """The limits of a config's data section.

    Attributes:
        maximum: tokens of a sample.
        overlong: `drop`, `truncate` or `error` for longer ones.
        source: tokens before a sample's first target; None sets no limit.
        target: tokens from its first target on; None sets no limit.
        bos_id: kept at the beginning of a source that is cut; None if the tokenizer has none.
    """

    maximum: int
    overlong: Literal["truncate", "drop", "error"] = "truncate"
    source: int | None = None
    target: int | None = None
    bos_id: int | None = None


def limit_length(sequence: TokenSequence, limits: Lengths, where: str, counts: Counter[str]) -> TokenSequence | None:
    """`sequence` within the limits; None if it is dropped, with the reason in `counts`.

    A source that is too long keeps its end, where the question and the header of the answer are. A target that is too
    long, and a whole sample, keep their beginning.

    Raises:
        RowError: it is longer than `overlong: error` allows.
    """
    if not sequence.targets.any():
        counts["dropped_no_targets"] += 1
        return None
    start = int(np.argmax(sequence.targets))
    length = len(sequence.input_ids)
    if sequence.cut and limits.source is not None and start + limits.maximum >= length:
        raise RowError(f"{where}: too long a text before its first target for data.max_source_length; must be shorter")
    checks = (("max_source_length", start, limits.source), ("max_target_length", length - start, limits.target))
    over = [(key, found, limit) for key, found, limit in checks if limit is not None and found > limit]
    for key, found, limit in over:
        if not _may_be_cut(found, sequence.cut, f"data.{key} {limit}", limits, where, counts):
            return None
    if over:
        counts["shortened"] += 1
        sequence = _shortened(sequence, start, limits)
        length = len(sequence.input_ids)
    if length <= limits.maximum:
        return sequence
    if not _may_be_cut(length, sequence.cut, f"data.max_length {limits.maximum}", limits, where, counts):
        return None
    if not sequence.targets[: limits.maximum].any():
        counts["dropped_targets_cut_off"] += 1
        return None
    counts["truncated"] += 1
    return _part(sequence, slice(limits.maximum))


def _may_be_cut(length: int, at_least: bool, limit: str, limits: Lengths, where: str, counts: Counter[str]) -> bool:
    """True to cut a sample, False to drop it, which is counted here."""
    if limits.overlong == "error":
        raise RowError(
            f"{where}: got {'at least ' * at_least}{length} tokens, must be at most {limit}, or set data.overlong to "
            "truncate or drop"
        )
    if limits.overlong == "drop":
        counts["dropped_overlong"] += 1
    return limits.overlong == "truncate"


def _shortened(sequence: TokenSequence, start: int, limits: Lengths) -> TokenSequence:
    """A sample whose source and target, which begins at token `start`, are within their limits."""
    end = None if limits.target is None else start + limits.target
    first = 0 if limits.source is None else max(0, start - limits.source)
    if not first or sequence.input_ids[0] != limits.bos_id:
        return _part(sequence, slice(first, end))
    kept = np.r_[0, np.arange(first + 1, len(sequence.input_ids) if end is None else end)]
    kept = kept[kept < len(sequence.input_ids)]
    return replace(sequence, input_ids=sequence.input_ids[kept], targets=sequence.targets[kept])


def _part(sequence: TokenSequence, part: slice) -> TokenSequence:
    # Copies, since parts of an array would keep all of it in memory.
    return replace(sequence, input_ids=sequence.input_ids[part].copy(), targets=sequence.targets[part].copy())
