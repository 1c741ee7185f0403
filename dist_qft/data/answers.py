"""Token sequences of one record's sample: of a pair both answers in one row, of anything else one answer."""

from collections import Counter
from dataclasses import replace

import numpy as np

from dist_qft.data.lengths import Lengths, limit_length
from dist_qft.data.samples import AnySample, Preference, Rated, Sample
from dist_qft.data.tokens import SampleEncoder, TokenSequence


def encode_answers(
    sample: AnySample, encoder: SampleEncoder, limits: Lengths, where: str, counts: Counter[str]
) -> list[TokenSequence]:
    """The rows of one sample within the limits, each answer for itself; none if an answer is dropped.

    A pair is one row, unless the task rates single answers: then it is one that is wanted and one that is not.

    Raises:
        RowError: the tokenizer, its template or the limits cannot take it.
    """

    def within_limits(answer: Sample) -> TokenSequence | None:
        return limit_length(encoder.encode(answer, where), limits, where, counts)

    match sample:
        case Rated(answer, desirable):
            return _rated(within_limits(answer), desirable)
        case Preference(chosen, rejected):
            first, second = within_limits(chosen), within_limits(rejected)
            if encoder.task.rows != "pairs" and encoder.task.rows != "pairs-with-prompts":
                return _rated(first, True) + _rated(second, False)
            return [] if first is None or second is None else [_joined(first, second)]
        case _:
            kept = within_limits(sample)
            return [] if kept is None else [kept]


def _rated(answer: TokenSequence | None, desirable: bool) -> list[TokenSequence]:
    return [] if answer is None else [replace(answer, label=float(desirable))]


def _joined(first: TokenSequence, second: TokenSequence) -> TokenSequence:
    return TokenSequence(
        np.concatenate([first.input_ids, second.input_ids]),
        np.concatenate([first.targets, second.targets]),
        second=len(first.input_ids),
    )
