"""One layer in another format, with dW in it, and the error that this makes."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dist_qft.merge.difference import Difference
from dist_qft.merge.merged_weight import add_rows, converted, live_rows
from dist_qft.methods.adapters.tile_adapter import TileAdapter
from dist_qft.quant.contract import Format
from dist_qft.quant.frozen import FrozenWeight


def requantized(
    weight: FrozenWeight,
    path: str,
    packed: Mapping[str, Tensor],
    adapter: TileAdapter | None,
    new: Format,
    difference: Difference,
) -> dict[str, Tensor]:
    """The packed tensors, in the format `new`, of a weight with its adapter's dW; adds the error to `difference`.

    Raises:
        NumericError: the merged weight is not finite.
    """
    shape = weight.weight_shape
    written = converted(weight.format, packed, shape, adapter, new, path)
    values = new.dequantize(written, shape, torch.float32)
    add_rows(difference, values, live_rows(weight.format, packed, shape, adapter), adapter is not None)
    return written
