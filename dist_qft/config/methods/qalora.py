"""QA-LoRA (arXiv 2309.14717): inputs pooled over a quantization block, so that dW folds into the block's zero."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from dist_qft.config.methods.tile_method import BlockMethod, RsLora, ScheduleRule, Tile
from dist_qft.config.section import Positive

_POOL = "inputs pooled together, a multiple of the base's block: QA-LoRA's group size"


class QaloraRule(ScheduleRule):
    """A rule of QA-LoRA's schedule."""

    pool: Positive | None = Field(None, description=_POOL)


class QaloraConfig(BlockMethod):
    """`qalora`: the pair A (rank x in / pool), B (out x rank)."""

    name: Literal["qalora"] = Field(
        description="a low-rank pair on pooled inputs, which merges exactly (QA-LoRA)",
        json_schema_extra={"axolotl": "adapter"},
    )
    pool: Positive = Field(32, description=_POOL, json_schema_extra={"peft": "qalora_group_size"})
    use_rslora: RsLora = False
    schedule: Sequence[QaloraRule] = Field([], description="exceptions by layer type and depth, in order")

    factors: ClassVar[Mapping[str, tuple[str, ...]]] = {"pool": ("in_features",)}
    balancing: ClassVar[tuple[str, ...]] = ("pool",)
    balancing_name: ClassVar[str] = "group size"

    def tile(self, knobs: Mapping[str, Any]) -> Tile:
        """Tiles of one output by `pool` inputs."""
        return Tile(pool=knobs["pool"], repeat=1, inner=knobs["rank"])
