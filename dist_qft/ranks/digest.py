"""A positional digest of tensor bytes: a sum that every rank can compute on its own part.

`digest = sum_i word_i * weight(i) mod 2^64` with odd weights. It is additive over parts, so the digest of a
sharded tensor is the plain sum of its shards' digests and no rank needs the whole; any single changed
word changes it, since an odd weight is invertible. It guards against accidents (drift, wrong file, flipped
bits), not against an adversary: files are guarded by SHA-256 in their manifests.
"""

import torch
from torch import Tensor

_MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)  # golden ratio, odd, as a signed 64-bit integer
# Words per chunk: bounds the int64 temporaries to 2 MiB each, on a GPU to 128: there a chunk is some five kernels.
_CPU_CHUNK, _ACCELERATOR_CHUNK = 1 << 18, 1 << 24

_WORD_VIEWS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def positional_digest(tensor: Tensor, start: int = 0) -> Tensor:
    """Digest of `tensor`'s elements as integer words, counted from element `start` of a larger tensor.

    Args:
        tensor: any shape and dtype; its bits are read, so NaN patterns and signed zeros count.
        start: index, in the whole tensor, of this part's first element.

    Returns:
        int64 scalar on the tensor's device. Digests of disjoint parts add up (wrapping) to the whole's.
    """
    words = tensor.detach().contiguous().view(-1).view(_WORD_VIEWS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    chunk = _CPU_CHUNK if tensor.device.type == "cpu" else _ACCELERATOR_CHUNK
    for first in range(0, words.numel(), chunk):
        part = words[first : first + chunk].to(torch.int64) + 1  # so that zeros count, and the length with them
        index = torch.arange(start + first, start + first + part.numel(), device=tensor.device)
        # Spread the index over all 64 bits; `| 1` makes the weight odd, hence invertible.
        weight = index.mul_(_MULTIPLIER).bitwise_or_(1)
        total += part.mul_(weight).sum()
    return total
