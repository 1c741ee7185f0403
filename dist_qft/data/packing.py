"""Packing: several short samples share a row, which would otherwise be padding for the most part.

Greedy best fit in data order: each sample goes to the fullest row that still takes it. Samples in a row do not see
each other: the positions of each restart at 0, which Hugging Face attention reads as the border of a sequence. It does
so only if the model is called without an attention mask and with `use_cache=False`: with a cache, which is its default,
it looks at no positions and lets the samples see each other.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Rows of sample indices, each of at most `row_length` tokens in all and in data order; every sample once.

    lengths: tokens of each sample, 1 to `row_length`. Rows come in the order in which they were opened.
    """
    rows: list[list[int]] = []
    rows_by_space: dict[int, list[int]] = {}  # free tokens -> rows with exactly so many
    spaces: list[int] = []  # the keys of rows_by_space, sorted; at most row_length of them
    for sample, length in enumerate(lengths):
        if not 0 < length <= row_length:
            raise ValueError(f"sample {sample} has {length} tokens, a row {row_length}")
        place = bisect_left(spaces, length)
        if place == len(spaces):
            row, space = len(rows), row_length
            rows.append([])
        else:
            space = spaces[place]
            row = rows_by_space[space].pop()
            if not rows_by_space[space]:
                del rows_by_space[space], spaces[place]
        rows[row].append(sample)
        space -= length
        if space not in rows_by_space:
            rows_by_space[space] = []
            insort(spaces, space)
        rows_by_space[space].append(row)
    return rows
