"""The formats there are, chosen by the names and settings of the config section `quantization`."""

from collections.abc import Sequence

from dist_qft.errors import UserError
from dist_qft.quant.affine4 import Affine4
from dist_qft.quant.contract import Format
from dist_qft.quant.dense import Dense
from dist_qft.quant.nf4 import NF4
from dist_qft.quant.q8_0 import Q8_0

__all__ = ["NF4", "Q8_0", "Affine4", "Dense", "Format", "embedding_format", "linear_format"]


def linear_format(linear: str, block: Sequence[int] | None = None, double_quant: bool = False) -> Format:
    """The format of the decoder's linear layers: `nf4` (block [64]), `affine4` (block [1, 32]) or `dense`.

    Raises UserError naming the config key for an unknown name, an illegal block, or a setting the format would ignore.
    """
    if linear not in ("nf4", "affine4", "dense"):
        raise UserError(f"quantization.linear: got '{linear}', need one of nf4, affine4, dense")
    if double_quant and linear != "nf4":
        raise UserError(f"quantization.double_quant: got true with linear '{linear}', only nf4 has it")
    if linear == "nf4":
        return NF4(*_sizes(block, "nf4", default=(64,)), double_quant=double_quant)
    if linear == "affine4":
        return Affine4(_sizes(block, "affine4", default=(1, 32)))
    if block is not None:
        raise UserError(f"quantization.block: got {list(block)} with linear 'dense', which has no blocks")
    return Dense()


def embedding_format(name: str) -> Format:
    """The format of the embedding and the LM head: `q8_0` or `dense`; raises UserError for any other name."""
    if name not in ("q8_0", "dense"):
        raise UserError(f"quantization.embedding: got '{name}', need one of q8_0, dense")
    return Q8_0() if name == "q8_0" else Dense()


def _sizes(block: Sequence[int] | None, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    if block is None:
        return default
    if len(block) != len(default):
        raise UserError(f"quantization.block: got {list(block)}, {name} needs {len(default)} as in {list(default)}")
    return tuple(block)
