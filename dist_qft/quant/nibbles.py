"""Two 4-bit codes in a byte: the packing of `affine4`, whatever its blocks and constants.

Codes are packed in groups of g consecutive inputs, g the largest power of two up to 32 that divides in_features: the
low nibbles of a group's g / 2 bytes hold its first g / 2 codes, the high nibbles the rest. With g = 32 that is the
order of GGUF's 4-bit types.
"""

import torch
from torch import Tensor

_WIDEST = 32
# A type for half a group's codes, by their bytes: torch moves one such element at a time where it would move bytes.
_HALVES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
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
    flat = codes.reshape(-1)
    if flat.numel() % 8 == 0 and flat.storage_offset() % 8 == 0:
        words = flat.view(torch.int64)
        low, high = words & _LOW_NIBBLES, (words >> 4).bitwise_and_(_LOW_NIBBLES)
    else:
        low, high = flat & 0x0F, flat >> 4
    half = _HALVES[group_width(out.shape[1]) // 2]
    nibbles = torch.stack([low.view(half), high.view(half)], dim=1)
    out.copy_(nibbles.view(torch.uint8).view(out.shape))
