"""Two 4-bit codes in a byte: the packing of `affine4`, whatever its blocks and constants.

Codes are packed in groups of g consecutive inputs, g the largest power of two up to 32 that divides in_features: the
low nibbles of a group's g / 2 bytes hold its first g / 2 codes, the high nibbles the rest. With g = 32 that is the
order of GGUF's 4-bit types.
"""

import torch
from torch import Tensor

_WIDEST = 32
_LOW_NIBBLES = 0x0F0F0F0F0F0F0F0F


def group_width(in_features: int) -> int:
    """Inputs packed together: the largest power of two up to 32 that divides in_features."""
    return min(_WIDEST, in_features & -in_features)


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 (rows, in_features / 2) of the codes 0..15, uint8 (rows, in_features); in_features is even."""
    halves = codes.unflatten(1, (-1, 2, group_width(codes.shape[1]) // 2))
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).flatten(1)


def unpack_into(codes: Tensor, out: Tensor) -> None:
    """Write the codes (rows, in_features / 2) as numbers into the contiguous `out` (rows, in_features) of any dtype."""
    half = group_width(out.shape[1]) // 2
    groups = codes.unflatten(1, (-1, half))
    halves = out.unflatten(1, (-1, 2, half))
    if half % 8 == 0 and codes.storage_offset() % 8 == 0 and codes.is_contiguous():
        # Eight bytes at a time: the same codes in less time than byte by byte into two strided halves.
        words = groups.view(torch.int64)
        nibbles = torch.stack([words & _LOW_NIBBLES, (words >> 4) & _LOW_NIBBLES], dim=2)
        halves.copy_(nibbles.view(torch.uint8))
    else:
        halves[:, :, 0].copy_(groups & 0x0F)
        halves[:, :, 1].copy_(groups >> 4)
