"""The replicas' comparison by tensor, once their digests differ."""

from collections import Counter
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from dist_qft.errors import NumericError
from dist_qft.ranks.digest import positional_digest


def name_difference(
    values: Tensor, spans: Mapping[str, tuple[int, int]], step: int, group: dist.ProcessGroup | None
) -> NumericError:
    """The error that names the first tensor that differs, and on which ranks. Collective.

    Args:
        values: this rank's replica, flat.
        spans: of each tensor in it, in the order of the model.
    """
    own = torch.stack([positional_digest(values[start:stop]) for start, stop in spans.values()])
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, own, group=group)
    for index, name in enumerate(spans):
        digests = [int(other[index]) for other in everyone]
        # The majority is taken for right; of two ranks that differ, nobody knows which one is.
        common = Counter(digests).most_common(1)[0][0]
        odd = [rank for rank, digest in enumerate(digests) if digest != common]
        if odd:
            ranks = ", ".join(map(str, odd))
            return NumericError(
                f"step {step}: replicas differ, first in {name}: rank {ranks} differs from rank {digests.index(common)}"
            )
    return NumericError(f"step {step}: replicas differed when their digests were summed, but no tensor differs now")
