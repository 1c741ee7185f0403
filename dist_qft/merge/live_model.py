"""The live model: a loaded base with its tile adapters attached, the start of a merge."""

from dataclasses import dataclass
from functools import cached_property

from dist_qft.base_model.skeleton import BaseModel
from dist_qft.merge.token_rows import TokenRowsInUse, token_rows
from dist_qft.methods.adapters.attach import AdapterSet
from dist_qft.quant.frozen import FrozenWeight
from dist_qft.sharding.engine import Engine
from dist_qft.tuned_model.assemble import Assembled


@dataclass(frozen=True)
class LiveModel:
    """A base under its engine, and the adapters attached to it."""

    base: BaseModel
    engine: Engine
    adapters: AdapterSet

    @classmethod
    def of(cls, parts: Assembled) -> "LiveModel":
        """The live model of an assembled run. TypeError for trainables that are not adapters: they do not merge."""
        if not isinstance(parts.trainables, AdapterSet):
            raise TypeError(f"only adapters merge into a base, got a {type(parts.trainables).__name__}")
        return cls(parts.base, parts.engine, parts.trainables)

    @cached_property
    def token_rows(self) -> dict[str, TokenRowsInUse]:
        """Trained rows of vocabulary tables, by table. Collective at the first use if there are any."""
        return token_rows(self.base, self.adapters)

    def weights(self) -> dict[str, FrozenWeight]:
        """The base's `frozen_weights`."""
        return frozen_weights(self.base)


def frozen_weights(base: BaseModel) -> dict[str, FrozenWeight]:
    """Every packed weight by module path, in the order in which a merge walks over them."""
    return base.weights()
