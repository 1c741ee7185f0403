"""Q-BaRA (arXiv 2407.17029v1; Q-BLoRA in its present version): QLoRA's parameters spent on more rank."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from dist_qft.config.methods.tile_method import PoolMode, RsLora, ScheduleRule, Tile, TileMethod
from dist_qft.config.section import Positive

_BALANCE = "balancing factor lambda: pools inputs, repeats outputs and multiplies the rank"


class QbaraRule(ScheduleRule):
    """A rule of Q-BaRA's schedule."""

    balance: Positive | None = Field(None, description=_BALANCE)


class QbaraConfig(TileMethod):
    """`qbara`: the pair A (balance * rank x in / balance), B (out / balance x balance * rank)."""

    name: Literal["qbara"] = Field(
        description="QLoRA's parameter count at lambda times the rank (Q-BaRA)",
        json_schema_extra={"axolotl": "adapter"},
    )
    balance: Positive = Field(2, description=_BALANCE)
    pool_mode: PoolMode = "mean"
    use_rslora: RsLora = False
    schedule: Sequence[QbaraRule] = Field([], description="exceptions by layer type and depth, in order")

    factors: ClassVar[Mapping[str, tuple[str, ...]]] = {"balance": ("in_features", "out_features")}
    balancing: ClassVar[tuple[str, ...]] = ("balance",)
    balancing_name: ClassVar[str] = "lambda"

    def tile(self, knobs: Mapping[str, Any]) -> Tile:
        """Square tiles, and a rank that grows with them: as many parameters for every lambda."""
        balance = knobs["balance"]
        return Tile(pool=balance, repeat=balance, inner=balance * knobs["rank"])
