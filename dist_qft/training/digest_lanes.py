"""A 64-bit digest as numbers whose sums over ranks are exact in fp32 and tell whether all ranks had the same one."""

import torch
from torch import Tensor

from dist_qft.ranks.digest import positional_digest

# Sums in fp32 are exact up to 2^24: split like this, the squares of up to 4096 ranks stay below.
_PIECE_BITS = 4
PIECES = 64 // _PIECE_BITS


def digest_pieces(values: Tensor) -> Tensor:
    """The 64-bit digest in pieces, each an fp32 number."""
    digest = positional_digest(values)
    shifts = torch.arange(0, 64, _PIECE_BITS, device=values.device)
    return ((digest >> shifts) & (2**_PIECE_BITS - 1)).float()


def pieces_agree(lanes: list[float], world: int) -> bool:
    """All ranks sent equal pieces if and only if N * sum(p^2) == (sum p)^2 for each (Cauchy-Schwarz).

    Every rank decides from the same reduced numbers, so all stop or none does.
    """
    sums, squares = lanes[:PIECES], lanes[PIECES:]
    return all(int(s) ** 2 == world * int(q) for s, q in zip(sums, squares, strict=True))
