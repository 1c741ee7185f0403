"""The options of a benchmark, and the sizes that follow from them."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dist_qft.ranks.device import compute_dtype, dtype_name


@dataclass(frozen=True)
class Options:
    """The options of `dist-qft bench`.

    Attributes:
        quick: run everything on a tiny model, in seconds: for trying out, the figures mean nothing.
        kept: file for the sides of a benchmark that is not at its end; None keeps none.
    """

    device: str = "cpu"
    quick: bool = False
    ranks: int = 2
    precision: str = "auto"
    kept: Path | None = None

    def common(self, ranks: int | None = None) -> dict[str, Any]:
        """The settings that all sides have: device, threads per rank and compute dtype, the same for ours and peers."""
        dtype = compute_dtype(self.precision, torch.device(self.device))
        threads = max(1, len(os.sched_getaffinity(0)) // (ranks or self.ranks))  # as many as there are cores for each
        return {"device": self.device, "threads": threads, "precision": dtype_name(dtype)}

    @property
    def model(self) -> str:
        """The main model, a name of `models.NAMES`."""
        return "tiny" if self.quick else "smollm2"

    @property
    def steps(self) -> int:
        """Steps that are timed, after two that are not."""
        return 2 if self.quick else 3
