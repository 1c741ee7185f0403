"""Limits on a sample's length, in tokens."""

from collections import Counter
from dataclasses import replace
from typing import Literal

from dist_qft.data.records import RowError
from dist_qft.data.tokens import TokenSequence


def limit_length(
    sequence: TokenSequence,
    max_length: int,
    overlong: Literal["truncate", "drop", "error"],
    where: str,
    counts: Counter[str],
) -> TokenSequence | None:
    """`sequence`, cut from the right to `max_length` tokens; None if it is dropped, with the reason in `counts`."""
    length = len(sequence.input_ids)
    if not sequence.targets.any():
        counts["dropped_no_targets"] += 1
        return None
    if length <= max_length:
        return sequence
    if overlong == "error":
        raise RowError(
            f"{where}: got {length} tokens, must be at most data.max_length {max_length}, or set data.overlong to "
            "truncate or drop"
        )
    if overlong == "drop":
        counts["dropped_overlong"] += 1
        return None
    if not sequence.targets[:max_length].any():
        counts["dropped_targets_cut_off"] += 1
        return None
    counts["truncated"] += 1
    return replace(sequence, input_ids=sequence.input_ids[:max_length], targets=sequence.targets[:max_length])
