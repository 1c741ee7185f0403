"""The door to the formats: one chosen by config settings, or made again from its own description."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dist_qft.errors import UserError
from dist_qft.quant.affine4 import Affine4
from dist_qft.quant.affine4_gathered import Affine4Gathered
from dist_qft.quant.affine8 import Affine8
from dist_qft.quant.codebook4 import Codebook4
from dist_qft.quant.contract import Format
from dist_qft.quant.dense import Dense
from dist_qft.quant.nf4 import NF4
from dist_qft.quant.q8_0 import Q8_0

__all__ = ["NF4", "Q8_0", "Affine4", "Dense", "Format", "described_format", "embedding_format", "linear_format"]

_KINDS: dict[str, type[Format]] = {
    kind.name: kind for kind in (NF4, Affine4, Affine4Gathered, Affine8, Codebook4, Q8_0, Dense)
}


@dataclass(frozen=True)
class LinearSettings:
    """The settings of linear layers' format in a config, besides its name. The config's check lets pass only
    what the named format has; None and False stand for the format's own defaults."""

    block: Sequence[int] | None = None
    double_quant: bool = False
    constants: str | None = None


def _nf4(settings: LinearSettings) -> Format:
    (block,) = settings.block or (64,)
    return NF4(block, double_quant=settings.double_quant)


def _affine4(settings: LinearSettings) -> Format:
    block_out, block_in = settings.block or (1, 32)
    return Affine4((block_out, block_in), settings.constants or "float16")


# `quantization.linear` -> its format. A new format adds a line here and a name to the schema's `LinearFormat`.
LINEAR: dict[str, Callable[[LinearSettings], Format]] = {
    "nf4": _nf4,
    "affine4": _affine4,
    "dense": lambda settings: Dense(),
}
EMBEDDING: dict[str, Callable[[], Format]] = {"q8_0": Q8_0, "dense": Dense}


def linear_format(
    linear: str, block: Sequence[int] | None = None, double_quant: bool = False, constants: str | None = None
) -> Format:
    """The format of the decoder's linear layers, by its name in the config. UserError for a block that cannot be."""
    return LINEAR[linear](LinearSettings(block, double_quant, constants))


def embedding_format(name: str) -> Format:
    """The format of the embedding and the LM head, by its name in the config."""
    return EMBEDDING[name]()


def described_format(description: Mapping[str, Any]) -> Format:
    """The format whose `describe` gives `description`.

    Raises UserError or TypeError if it describes none: an unknown name, or settings the format does not have.
    """
    settings = dict(description)
    kind = _KINDS.get(settings.pop("name", ""))
    if kind is None:
        raise UserError(f"format: got {description.get('name')!r}, must be one of {', '.join(_KINDS)}")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()})
