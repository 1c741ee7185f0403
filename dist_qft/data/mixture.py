"""The order of rows: of one data set, or of several that are mixed by weights.

The row at a global position is a pure function of the seed and that position, so a run resumes anywhere, on any
number of ranks. With weights, one epoch is as many rows as all data sets hold together, and each data set gives its
share of them: small ones begin again, large ones go on in the next epoch where they were.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from dist_qft.data.dataset import Part


@lru_cache(maxsize=2)  # a step may span two epochs
def order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """(num_rows,) int64: the permutation of rows in one epoch.

    By sorting Philox's raw output, whose stream NumPy never changes (NEP 19), unlike that of `permutation`.
    """
    keys = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(num_rows)
    permutation = np.argsort(keys, kind="stable")
    permutation.flags.writeable = False  # the cache hands out the same array again
    return permutation


def shares(parts: Sequence[Part]) -> list[int]:
    """Rows that each data set gives to an epoch: all rows divided by weight, the largest remainders rounded up."""
    total, weights = sum(part.rows for part in parts), sum(part.weight for part in parts)
    exact = [total * part.weight / weights for part in parts]
    found = [int(share) for share in exact]
    by_remainder = sorted(range(len(parts)), key=lambda index: (found[index] - exact[index], index))
    for index in by_remainder[: total - sum(found)]:
        found[index] += 1
    return found


class RowOrder:
    """The row at each global position, for `num_rows` rows in all. Rows of mixed data sets lie one behind the other."""

    def __init__(self, seed: int, num_rows: int, mixture: Sequence[Part] = ()) -> None:
        self._seed, self._num_rows, self._mixture = seed, num_rows, mixture
        self._shares = np.array(shares(mixture), dtype=np.int64)
        self._firsts = np.cumsum([0, *(part.rows for part in mixture)])
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self._num_rows)
        if not self._mixture:
            return int(order(self._seed, epoch, self._num_rows)[place])
        parts, numbers = self._epoch(epoch)
        part = int(parts[place])
        # The position within this data set's own rows, which are drawn in their own epochs.
        own_epoch, own_place = divmod(epoch * int(self._shares[part]) + int(numbers[place]), self._mixture[part].rows)
        return int(self._firsts[part] + self._order(part, own_epoch)[own_place])

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows,) each: the data set at each place of an epoch, and how many rows it gave to the epoch before."""
        if epoch not in self._epochs:
            parts = np.repeat(np.arange(len(self._mixture)), self._shares)[order(self._seed, epoch, self._num_rows)]
            numbers = np.empty(self._num_rows, dtype=np.int64)
            for part in range(len(self._mixture)):
                mine = parts == part
                numbers[mine] = np.arange(np.count_nonzero(mine))
            self._epochs = {kept: value for kept, value in self._epochs.items() if kept == epoch - 1}
            self._epochs[epoch] = parts, numbers
        return self._epochs[epoch]

    def _order(self, part: int, own_epoch: int) -> np.ndarray:
        if (part, own_epoch) not in self._orders:
            drawn = order(self._seed, (part + 1) << 32 | own_epoch, self._mixture[part].rows)
            kept = {key: value for key, value in self._orders.items() if key[0] != part or key[1] == own_epoch - 1}
            self._orders = {**kept, (part, own_epoch): drawn}
        return self._orders[part, own_epoch]
