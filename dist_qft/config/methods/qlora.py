"""QLoRA (arXiv 2305.14314): a low-rank pair on a 4-bit base. The baseline of all other methods."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ConfigDict, Field

from dist_qft.config.methods.tile_method import RsLora, Tile, TileMethod


def _name_may_be_left_out(schema: dict[str, Any]) -> None:
    """Say so in the JSON schema: a `method` section without a name is qlora's (see `door`)."""
    schema.pop("required", None)
    schema["properties"]["name"]["default"] = "qlora"


class QloraConfig(TileMethod):
    """`qlora`: the pair A (rank x in), B (out x rank)."""

    model_config = ConfigDict(json_schema_extra=_name_may_be_left_out)

    name: Literal["qlora"] = Field(
        description="a low-rank pair on each layer (QLoRA)", json_schema_extra={"axolotl": "adapter"}
    )
    use_rslora: RsLora = False

    def tile(self, knobs: Mapping[str, Any]) -> Tile:
        """Tiles of one weight."""
        return Tile(pool=1, repeat=1, inner=knobs["rank"])
