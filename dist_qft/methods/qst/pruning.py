"""A side network that starts from the base's own weights instead of random ones (`method.init: pruned`).

Kept is every r-th row and column, as Ladder Side-Tuning prunes its side network (arXiv 2206.06522), but evenly spaced:
channel j of a narrow head is then channel r j of the wide one, for which the rotary embedding of the narrow head size
has the very same frequency. Families that turn neighbouring channels (2 i, 2 i + 1) instead of the two halves of a head
keep every r-th pair of queries and keys. That needs the base's own number of heads.
"""

import re
import sys

import torch
from torch import Tensor, nn

from dist_qft.base_model.model_tensors import check_names
from dist_qft.base_model.skeleton import BaseModel
from dist_qft.base_model.sources import TensorSource
from dist_qft.methods.qst.network import SideNetwork

_TURNED_ROWS = re.compile(r"\.[qk]_proj\.(weight|bias)$")  # rows are channels of the heads
_TURNED_LAST = re.compile(r"\.[qk]_norm\.(weight|bias)$")  # the last dimension is channels of a head


@torch.no_grad()
def start_from_base(side: SideNetwork, base: BaseModel, source: TensorSource) -> None:
    """Overwrite layers and final norm of a fresh side network, reading the base's weights one tensor at a time."""
    tensors = check_names(base, source)
    decoder = next(name for name, module in base.model.named_modules() if module is base.decoder)
    in_pairs = turns_neighbours(side.decoder)
    for name, parameter in side.decoder.named_parameters():
        kept = [every_channel(size, side.settings.reduction) for size in parameter.shape]
        turned = 0 if _TURNED_ROWS.search(name) else -1 if _TURNED_LAST.search(name) else None
        if in_pairs and turned is not None:
            kept[turned] = every_pair(parameter.shape[turned], side.settings.reduction)
        wide = tensors.read(f"{decoder}.{name}")
        for dim, channels in enumerate(kept):
            wide = wide.index_select(dim, channels)
        parameter.copy_(wide)


def every_channel(count: int, reduction: int) -> Tensor:
    """The channels that `count` narrow ones are taken from: every r-th."""
    return torch.arange(count) * reduction


def every_pair(count: int, reduction: int) -> Tensor:
    """The channels that `count` narrow ones (an even number) are taken from: every r-th pair of neighbours."""
    narrow = torch.arange(count)
    return narrow // 2 * 2 * reduction + narrow % 2


def turns_neighbours(decoder: nn.Module) -> bool:
    """True if a family's rotary embedding turns neighbouring channels, not the two halves of a head."""
    rotate_half = getattr(sys.modules[type(decoder).__module__], "rotate_half", None)
    if rotate_half is None:
        return False
    return rotate_half(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [-2.0, 1.0, -4.0, 3.0]
