"""The tile adapters of a run as a `Plan`: their settings by layer, stored in and made again from a checkpoint."""

from collections.abc import Mapping
from typing import Any

from dist_qft.methods.adapters.attach import AdapterSet
from dist_qft.methods.adapters.schedule import TileSettings


class AdapterPlan(dict[str, TileSettings]):
    """Layer path -> adapter settings, in model order."""

    peft_type = "DIST_QFT_TILE"
    backward_through_base = True

    @property
    def parameters(self) -> int:
        """Number of trainable values."""
        return sum(settings.parameters for settings in self.values())

    def describe(self) -> dict[str, Any]:
        """The settings of every adapter."""
        return {"tiles": {path: settings.to_dict() for path, settings in self.items()}}

    def difference(self, stored: Mapping[str, Any]) -> str | None:
        """The first layer, by name, whose adapter is not the stored one, and its settings then and now."""
        saved, wanted = stored.get("tiles", {}), self.describe()["tiles"]
        for path in sorted({*saved, *wanted}):
            before, now = saved.get(path, {}), wanted.get(path, {})
            if before != now:
                changes = [
                    f"{key} was {before.get(key, 'absent')}, the config says {now.get(key, 'absent')}"
                    for key in {**before, **now}
                    if before.get(key) != now.get(key)
                ]
                return f"adapter of {path}: {'; '.join(changes)}"
        return None

    def summary(self) -> str:
        """How many layers have an adapter."""
        return f"{len(self)} layers"

    def build(self, seed: int) -> AdapterSet:
        """Fresh adapters on the CPU."""
        return AdapterSet.build(self, seed)


def stored_adapters(stored: Mapping[str, Any], where: str) -> AdapterPlan:
    """The adapters that `describe` has described; `where` names the file, for messages."""
    tiles = stored.get("tiles", {})
    return AdapterPlan(
        {path: TileSettings.from_dict(fields, where=f"{where}: {path}") for path, fields in tiles.items()}
    )
