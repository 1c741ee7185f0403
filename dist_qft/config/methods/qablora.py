"""QA-BLoRA (arXiv 2407.17029, the version in TACL 2025): a low-rank pair whose tiles are the base's blocks."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from dist_qft.config.methods.qahira import POOL, REPEAT
from dist_qft.config.methods.tile_method import BlockMethod, RsLora, ScheduleRule, Tile
from dist_qft.config.section import Positive


class QabloraRule(ScheduleRule):
    """A rule of QA-BLoRA's schedule."""

    pool: Positive | None = Field(None, description=POOL)
    repeat: Positive | None = Field(None, description=REPEAT)


class QabloraConfig(BlockMethod):
    """`qablora`: the pair A (rank x in / pool), B (out / repeat x rank).

    The present version of the paper calls v1's Q-BaRA Q-BLoRA. With repeat 1 this is QA-LoRA.
    """

    name: Literal["qablora"] = Field(
        description="a low-rank pair on the base's blocks, which merges exactly (QA-BLoRA, in place of v1's QA-HiRA)",
        json_schema_extra={"axolotl": "adapter"},
    )
    pool: Positive = Field(4, description=POOL)
    repeat: Positive = Field(8, description=REPEAT)
    use_rslora: RsLora = False
    schedule: Sequence[QabloraRule] = Field([], description="exceptions by layer type and depth, in order")

    factors: ClassVar[Mapping[str, tuple[str, ...]]] = {"pool": ("in_features",), "repeat": ("out_features",)}
    balancing: ClassVar[tuple[str, ...]] = ("repeat", "pool")
    balancing_name: ClassVar[str] = "tile"

    def tile(self, knobs: Mapping[str, Any]) -> Tile:
        """Tiles of `repeat` outputs by `pool` inputs, on a product of rank `rank`."""
        return Tile(pool=knobs["pool"], repeat=knobs["repeat"], inner=knobs["rank"])
