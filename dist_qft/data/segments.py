"""The places of a micro-batch's samples: the borders that keep packed samples apart, as attention takes them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """The samples of b rows of L tokens, one behind the other, rows first. Padding counts as samples of its own.

    Attributes:
        starts: int32 (samples + 1,): the first token of each sample, and b L. "cu_seqlens" of flash attention.
        bounds: the same numbers for Python, so that nobody asks a GPU for them.
        rows: b.
    """

    starts: Tensor
    bounds: tuple[int, ...]
    rows: int

    @classmethod
    def of(cls, position_ids: Tensor) -> "Segments":
        """The samples of position ids (b, L): one begins where a row does, and where a position does not follow.

        Waits for the device if the ids are on one.
        """
        begins = torch.ones(position_ids.shape, dtype=torch.bool)
        begins[:, 1:] = (position_ids[:, 1:] != position_ids[:, :-1] + 1).cpu()
        starts = begins.flatten().nonzero().squeeze(1)
        starts = torch.cat([starts, torch.tensor([position_ids.numel()])]).to(torch.int32)
        bounds = tuple(starts.tolist())
        return cls(starts.to(position_ids.device), bounds, position_ids.shape[0])

    @property
    def whole_rows(self) -> bool:
        """True if each row is one sample."""
        return len(self.bounds) - 1 == self.rows

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max(stop - start for start, stop in zip(self.bounds, self.bounds[1:], strict=False))

    def to(self, device: torch.device) -> "Segments":
        """The same with `starts` on a device; a copy from pinned memory does not wait."""
        return replace(self, starts=self.starts.to(device, non_blocking=True))

    def pinned(self) -> "Segments":
        """The same with `starts` in page-locked memory."""
        return replace(self, starts=self.starts.pin_memory())
