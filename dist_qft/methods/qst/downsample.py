"""Downsampling of the base's hidden states (..., d) to the side network's width (..., d / r): the paper's table 6.

    adapter    LayerNorm(L2 swish(L1 h)), L1: d -> rank, L2: rank -> d / r    the default
    lora       L2 L1 h
    linear     L h
    maxpool    the largest of r neighbouring channels
    avgpool    their mean

The paper gives the adapter as L1, a non-linearity and L2. The LayerNorm behind them is the released code's; without it
the few huge channels of deep layers drown the others. Its two products have no bias under `compat: released`.
"""

from torch import Tensor, nn

from dist_qft.methods.qst.settings import SideSettings


def make_downsample(settings: SideSettings, width: int) -> nn.Module:
    """The learned part for one layer; nothing for pooling, which `pool` does."""
    rank, narrow = settings.downsample_rank, width // settings.reduction
    match settings.downsample:
        case "adapter":
            bias = settings.compat == "paper"
            products = nn.Linear(width, rank, bias=bias), nn.Linear(rank, narrow, bias=bias)
            return nn.Sequential(products[0], nn.SiLU(), products[1], nn.LayerNorm(narrow))
        case "lora":
            return nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, narrow, bias=False))
        case "linear":
            return nn.Linear(width, narrow)
    return nn.Identity()


def pool(settings: SideSettings, states: Tensor) -> Tensor:
    """The part without parameters: (..., d / r) for the pooling variants, for the others `states` as they are."""
    if not settings.pools:
        return states
    groups = states.unflatten(-1, (-1, settings.reduction))
    return groups.amax(-1) if settings.downsample == "maxpool" else groups.mean(-1)
