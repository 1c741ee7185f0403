"""Rows of several data sets: shares by weight, every row of an epoch's share once, resumable at any position."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_qft.data.dataset import Part, TokenDataset
from dist_qft.data.mixture import RowOrder, order, shares
from dist_qft.data.tokens import TokenSequence

PARTS = st.lists(st.builds(Part, st.integers(1, 40), st.floats(0.01, 100)), min_size=1, max_size=4)


@given(PARTS)
def test_shares_are_the_weights(parts):
    found, total, weight = shares(parts), sum(part.rows for part in parts), sum(part.weight for part in parts)
    assert sum(found) == total
    for part, share in zip(parts, found, strict=True):
        assert abs(share - total * part.weight / weight) <= 1


@given(PARTS, st.integers(0, 5))
def test_an_epoch_draws_the_shares_and_each_data_set_its_rows_evenly(parts, seed):
    total = sum(part.rows for part in parts)
    rows, drawn = RowOrder(seed, total, parts), Counter()
    firsts = np.cumsum([0, *(part.rows for part in parts)])
    for epoch in range(3):
        ids = [rows[position] for position in range(epoch * total, (epoch + 1) * total)]
        counts = np.bincount(np.searchsorted(firsts, ids, side="right") - 1, minlength=len(parts))
        assert counts.tolist() == shares(parts)
        drawn.update(ids)
    for first, part in zip(firsts, parts, strict=False):
        times = [drawn[row] for row in range(first, first + part.rows)]
        assert max(times) - min(times) <= 1


@given(PARTS, st.integers(0, 3), st.lists(st.integers(0, 300), max_size=30))
def test_the_row_at_a_position_depends_on_nothing_else(parts, seed, positions):
    total = sum(part.rows for part in parts)
    rows = RowOrder(seed, total, parts)
    assert [rows[position] for position in positions] == [RowOrder(seed, total, parts)[p] for p in positions]


def test_without_weights_the_order_is_one_permutation_an_epoch():
    rows = RowOrder(7, 10)
    assert [rows[position] for position in range(20)] == [*order(7, 0, 10), *order(7, 1, 10)]


@pytest.mark.parametrize("packed_length", [None, 12])
def test_data_sets_lie_one_behind_the_other(packed_length, tmp_path):
    def dataset(*lengths):
        sequences = [TokenSequence(np.full(n, n, dtype=np.int32), np.ones(n, dtype=bool)) for n in lengths]
        return TokenDataset.from_sequences(sequences, 0, packed_length, {})

    parts = [dataset(3, 4, 5), dataset(6, 7)]
    mixed = TokenDataset.mixed(parts, [1.0, 2.0], {"read": 5})
    rows = [row for part in parts for row in map(part.row, range(len(part)))]
    for index, row in enumerate(rows):
        for mine, theirs in zip(mixed.row(index), row, strict=True):
            assert mine.tolist() == theirs.tolist()
    assert len(mixed) == len(rows) and mixed.counts["tokens"] == 25 and mixed.counts["rows"] == len(rows)
    mixed.save(tmp_path / "x.safetensors")
    loaded = TokenDataset.load(tmp_path / "x.safetensors")
    assert loaded.digest == mixed.digest and loaded.mixture == mixed.mixture
    assert loaded.digest != TokenDataset.mixed(parts, [1.0, 3.0], {}).digest
