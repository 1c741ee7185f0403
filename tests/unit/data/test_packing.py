"""Packing: every sample once, in order, in rows that fit; and as tight as best fit should be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_qft.data.packing import pack


def best_fit_reference(lengths, row_length):
    """The definition, by looking at every row; of equally full rows the last that became so."""
    rows, touched = [], []
    for sample, length in enumerate(lengths):
        used = [sum(lengths[i] for i in row) for row in rows]
        fitting = [(used[r], touched[r], r) for r in range(len(rows)) if used[r] + length <= row_length]
        row = max(fitting)[2] if fitting else len(rows)
        if not fitting:
            rows.append([])
            touched.append(0)
        rows[row].append(sample)
        touched[row] = sample
    return rows


def test_by_hand():
    # 6 opens a row, 5 a second; 4 fills the first, 3 the second to 8, 2 fills that, 1 opens a third.
    assert pack([6, 5, 4, 3, 2, 1], 10) == [[0, 2], [1, 3, 4], [5]]
    assert pack([], 10) == []
    assert pack([10, 10], 10) == [[0], [1]]


@given(st.lists(st.integers(1, 20), max_size=60))
def test_equals_the_definition(lengths):
    rows = pack(lengths, 20)
    assert rows == best_fit_reference(lengths, 20)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(row == sorted(row) and sum(lengths[i] for i in row) <= 20 for row in rows)


@pytest.mark.parametrize("length", [0, 11])
def test_sample_that_fits_no_row(length):
    with pytest.raises(ValueError, match=f"sample 1 has {length} tokens, a row 10"):
        pack([3, length], 10)
