"""QA-HiRA (arXiv 2407.17029v1): a single matrix whose tiles are the base's blocks. Not PEFT's unrelated `hira`."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from dist_qft.config.methods.tile_method import BlockMethod, ScheduleRule, Tile
from dist_qft.config.section import Positive

POOL = "inputs of a tile, pooled together; a multiple of the base's block"
REPEAT = "outputs of a tile, copies of one value; a multiple of the base's block"


class QahiraRule(ScheduleRule):
    """A rule of QA-HiRA's schedule."""

    pool: Positive | None = Field(None, description=POOL)
    repeat: Positive | None = Field(None, description=REPEAT)


class QahiraConfig(BlockMethod):
    """`qahira`: the matrix A (out / repeat x in / pool) alone. Its rank shapes nothing and only sets the scale."""

    name: Literal["qahira"] = Field(
        description="a single matrix on the base's blocks, which merges exactly (QA-HiRA)",
        json_schema_extra={"axolotl": "adapter"},
    )
    pool: Positive = Field(4, description=POOL)
    repeat: Positive = Field(8, description=REPEAT)
    schedule: Sequence[QahiraRule] = Field([], description="exceptions by layer type and depth, in order")

    factors: ClassVar[Mapping[str, tuple[str, ...]]] = {"pool": ("in_features",), "repeat": ("out_features",)}
    balancing: ClassVar[tuple[str, ...]] = ("repeat", "pool")
    balancing_name: ClassVar[str] = "tile"
    ranked: ClassVar[bool] = False

    def tile(self, knobs: Mapping[str, Any]) -> Tile:
        """Tiles of `repeat` outputs by `pool` inputs, one trained value each."""
        return Tile(pool=knobs["pool"], repeat=knobs["repeat"], inner=None)
