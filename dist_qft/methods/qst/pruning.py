"""A side network that starts from the base's own weights instead of random ones (`method.init: pruned`).

Kept is every r-th row and column, as Ladder Side-Tuning prunes its side network (arXiv 2206.06522), but evenly spaced:
channel j of a narrow head is then channel r j of the wide one, for which the rotary embedding of the narrow head size
has the very same frequency. That needs the base's own number of heads.
"""

import torch

from dist_qft.base_model.model_tensors import check_names
from dist_qft.base_model.skeleton import BaseModel
from dist_qft.base_model.sources import TensorSource
from dist_qft.methods.qst.network import SideNetwork


@torch.no_grad()
def start_from_base(side: SideNetwork, base: BaseModel, source: TensorSource) -> None:
    """Overwrite layers and final norm of a fresh side network, reading the base's weights one tensor at a time."""
    tensors = check_names(base, source)
    decoder = next(name for name, module in base.model.named_modules() if module is base.decoder)
    every = slice(None, None, side.settings.reduction)
    for name, parameter in side.decoder.named_parameters():
        wide = tensors.read(f"{decoder}.{name}")
        parameter.copy_(wide[(every,) * wide.ndim])
