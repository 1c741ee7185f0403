"""The door to the formats: one chosen by config settings, or made again from its own description."""

from collections.abc import Mapping, Sequence
from typing import Any

from dist_qft.errors import UserError
from dist_qft.quant.affine4 import Affine4
from dist_qft.quant.affine4_gathered import Affine4Gathered
from dist_qft.quant.codebook4 import Codebook4
from dist_qft.quant.contract import Format
from dist_qft.quant.dense import Dense
from dist_qft.quant.nf4 import NF4
from dist_qft.quant.q8_0 import Q8_0

__all__ = ["NF4", "Q8_0", "Affine4", "Dense", "Format", "described_format", "embedding_format", "linear_format"]

_KINDS: dict[str, type[Format]] = {kind.name: kind for kind in (NF4, Affine4, Affine4Gathered, Codebook4, Q8_0, Dense)}


def linear_format(
    linear: str, block: Sequence[int] | None = None, double_quant: bool = False, constants: str | None = None
) -> Format:
    """The format of the decoder's linear layers: `nf4` (block [64]), `affine4` (block [1, 32]) or `dense`.

    Raises UserError naming the config key for an unknown name, an illegal block, or a setting the format would ignore.
    """
    if linear not in ("nf4", "affine4", "dense"):
        raise UserError(f"quantization.linear: got '{linear}', need one of nf4, affine4, dense")
    if double_quant and linear != "nf4":
        raise UserError(f"quantization.double_quant: got true with linear '{linear}', only nf4 has it")
    if constants is not None and linear != "affine4":
        raise UserError(f"quantization.constants: got '{constants}' with linear '{linear}', only affine4 has it")
    if linear == "nf4":
        return NF4(*_sizes(block, "nf4", default=(64,)), double_quant=double_quant)
    if linear == "affine4":
        return Affine4(_sizes(block, "affine4", default=(1, 32)), constants or "float16")
    if block is not None:
        raise UserError(f"quantization.block: got {list(block)} with linear 'dense', which has no blocks")
    return Dense()


def embedding_format(name: str) -> Format:
    """The format of the embedding and the LM head: `q8_0` or `dense`; raises UserError for any other name."""
    if name not in ("q8_0", "dense"):
        raise UserError(f"quantization.embedding: got '{name}', need one of q8_0, dense")
    return Q8_0() if name == "q8_0" else Dense()


def described_format(description: Mapping[str, Any]) -> Format:
    """The format of which `description` is what its `describe` says.

    Raises UserError or TypeError if it describes none: an unknown name, or settings the format does not have.
    """
    settings = dict(description)
    kind = _KINDS.get(settings.pop("name", ""))
    if kind is None:
        raise UserError(f"format: got {description.get('name')!r}, must be one of {', '.join(_KINDS)}")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()})


def _sizes(block: Sequence[int] | None, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    if block is None:
        return default
    if len(block) != len(default):
        raise UserError(f"quantization.block: got {list(block)}, {name} needs {len(default)} as in {list(default)}")
    return tuple(block)
