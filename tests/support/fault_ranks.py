"""The ranks of runs that faults strike: one base over two of them, or two bases over twice as many.

With DIST_QFT_TEST_GROUP=N the runs of the fault tests have 2 x N ranks and `sharding.group: N`, so that a rank is lost,
stopped or told to end while ranks of another base go on.
"""

import os
from dataclasses import dataclass
from typing import Any

# The word by which fault tests take several bases; None for one over all ranks.
GROUP = int(os.environ.get("DIST_QFT_TEST_GROUP", "0")) or None


@dataclass(frozen=True)
class FaultRanks:
    """`count` ranks with a base over every `group` of them, or over all."""

    count: int = 2
    group: int | None = None

    @property
    def last(self) -> int:
        """The last rank: of another base than rank 0 if there are several."""
        return self.count - 1

    def sharding(self, **settings: Any) -> dict[str, Any]:
        """The section `sharding` of a config, with these settings beside the group."""
        return settings if self.group is None else {**settings, "group": self.group}


def fault_ranks(group: int | None = GROUP) -> FaultRanks:
    """Two ranks with one base, or those of two bases if there are groups."""
    return FaultRanks() if group is None else FaultRanks(2 * group, group)
