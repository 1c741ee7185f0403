"""Token sequences of one record's sample: of a pair both answers in one row, of anything else one answer."""

from collections import Counter
from dataclasses import replace

import numpy as np

from dist_qft.data.lengths import Lengths, limit_length
from dist_qft.data.long_texts import characters_of, most_characters
from dist_qft.data.records import RowError
from dist_qft.data.samples import AnySample, Conversation, Preference, Rated, Sample
from dist_qft.data.tokens import SampleEncoder, TokenSequence


def encode_answers(
    sample: AnySample, encoder: SampleEncoder, limits: Lengths, where: str, counts: Counter[str]
) -> list[TokenSequence]:
    """The rows of one sample within the limits, each answer for itself; none if an answer is dropped.

    A pair is one row, unless the task rates single answers: then it is one that is wanted and one that is not. A pair
    whose answers are the same tokens, as they may be once they are cut, is dropped.

    Raises:
        RowError: the tokenizer, its template or the limits cannot take it.
    """
    found: Counter[str] = Counter()
    rows = _rows(sample, encoder, limits, where, found)
    counts.update(found.keys())  # of records: what happens to both answers of one counts once
    return rows


def _rows(
    sample: AnySample, encoder: SampleEncoder, limits: Lengths, where: str, counts: Counter[str]
) -> list[TokenSequence]:
    def within_limits(answer: Sample) -> TokenSequence | None:
        if isinstance(answer, Conversation) and _too_long(answer, limits, where):
            counts["dropped_overlong"] += 1
            return None
        return limit_length(encoder.encode(answer, where), limits, where, counts)

    match sample:
        case Rated(answer, desirable):
            return _rated(within_limits(answer), desirable)
        case Preference(chosen, rejected):
            first, second = within_limits(chosen), within_limits(rejected)
            if first is not None and second is not None and np.array_equal(first.input_ids, second.input_ids):
                counts["dropped_same_answers"] += 1
                return []
            if encoder.task.rows != "pairs" and encoder.task.rows != "pairs-with-prompts":
                other = second if first is None or second is None else replace(second, follows=True)
                return _rated(first, True) + _rated(other, False)
            return [] if first is None or second is None else [_joined(first, second)]
        case _:
            kept = within_limits(sample)
            return [] if kept is None else [kept]


def _too_long(conversation: Conversation, limits: Lengths, where: str) -> bool:
    """True to drop a conversation that has too many characters to be rendered. RowError where none may be dropped."""
    found, most = characters_of(conversation), most_characters(limits.maximum)
    if found > most and limits.overlong != "drop":
        raise RowError(
            f"{where}: got a conversation of at least {found:,} characters, must be at most {most:,} for "
            f"data.max_length {limits.maximum}, or set data.overlong to drop"
        )
    return found > most


def _rated(answer: TokenSequence | None, desirable: bool) -> list[TokenSequence]:
    return [] if answer is None else [replace(answer, label=float(desirable))]


def _joined(first: TokenSequence, second: TokenSequence) -> TokenSequence:
    return TokenSequence(
        np.concatenate([first.input_ids, second.input_ids]),
        np.concatenate([first.targets, second.targets]),
        second=len(first.input_ids),
    )
