"""A fixed piece of text, and how two models' logits on it differ: the certificate's figures on behaviour."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dist_qft.base_model.skeleton import BaseModel
from dist_qft.merge.live_model import LiveModel
from dist_qft.merge.merged_weight import converted, live_weight
from dist_qft.methods.adapters.tile_adapter import TileAdapter
from dist_qft.quant.contract import Format, PackedShapes, Shape
from dist_qft.sharding.host_memory import return_freed_memory

PROBE_TOKENS = 64
_TEXT = (
    "A merge folds what was learned into the weights that were frozen. If it is exact, the merged model must answer as "
    "the trained one did: the same question about Python, the same sum of 17 and 25, the same capital of France, and "
    "the same next word in every sentence, however long the text is and whatever it is about."
)


@dataclass(frozen=True)
class LogitDifference:
    """Distance of a result's logits from the live model's, over all positions and the whole vocabulary.

    `largest_logit` gives the scale; perplexities are of the probe text.
    """

    maximum: float
    mean: float
    largest_logit: float
    live_perplexity: float
    perplexity: float

    @property
    def finite(self) -> bool:
        """True if neither model's logits had a NaN or an infinity."""
        return all(map(math.isfinite, asdict(self).values()))


def probe_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of the probe text."""
    return tokenizer(_TEXT)["input_ids"][:PROBE_TOKENS]


@torch.no_grad()
def logits_of(base: BaseModel, ids: list[int], device: torch.device) -> Tensor:
    """Logits (tokens, vocabulary), float32 on the CPU. Collective if the base is sharded.

    Memory that a layer needed is given back after it: a merge must not take more than a few layers beside the shards.
    """
    # After each matrix, too: its pieces can leave holes of its size.
    modules = [*base.layers, *base.matrices.values()]
    hooks = [module.register_forward_hook(lambda *_: return_freed_memory()) for module in modules]
    try:
        logits = base.model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits
        return logits[0].float().cpu()
    finally:
        for hook in hooks:
            hook.remove()


def compare_logits(live: Tensor, other: Tensor, ids: list[int]) -> LogitDifference:
    """The difference between two logits (tokens, vocabulary) of the same ids; NaN in one makes the figures NaN."""
    distance = (other - live).abs()
    return LogitDifference(
        maximum=float(distance.max()),
        mean=float(distance.mean(dtype=torch.float64)),
        largest_logit=float(live.abs().max()),
        live_perplexity=_perplexity(live, ids),
        perplexity=_perplexity(other, ids),
    )


@contextmanager
def as_written(live: LiveModel, formats: Mapping[str, Format], dtype: torch.dtype | None) -> Iterator[None]:
    """Context in which the base computes with the weights that an inexact merge would write. Disable adapters in it.

    Each weight is converted when it is used, from the gathered tensors: no rank ever holds more than one.

    Args:
        formats: linear layers that are converted, and to which format.
        dtype: all other weights are rounded to it, dW included; None leaves them alone.
    """
    before = {}
    for path, weight in live.weights().items():
        written = formats.get(path, dtype)
        if written is not None:
            before[weight] = weight.format
            weight.format = WrittenFormat(weight.format, live.adapters.by_path.get(path), written)
    try:
        yield
    finally:
        for weight, format in before.items():
            weight.format = format


class WrittenFormat(Format):
    """A format's packed tensors, read as the weight that a merge would write in their place.

    Args:
        stored: the format of the packed tensors.
        adapter: the layer's adapter, whose dW is added; None for a layer without one.
        written: the result's format, or the dtype of a dense result.
    """

    name = "written"

    def __init__(self, stored: Format, adapter: TileAdapter | None, written: Format | torch.dtype) -> None:
        self._stored, self._adapter, self._written = stored, adapter, written

    @property
    def row_local(self) -> bool:
        """False with an adapter: dW belongs to rows of the whole weight, and a slice does not say which it holds."""
        whole_only = isinstance(self._written, Format) and not self._written.row_local
        return self._adapter is None and self._stored.row_local and not whole_only

    @property
    def row_alignment(self) -> int:
        written = self._written.row_alignment if isinstance(self._written, Format) else 1
        return math.lcm(self._stored.row_alignment, written)

    def describe(self) -> dict[str, Any]:
        written = self._written.describe() if isinstance(self._written, Format) else {"name": str(self._written)}
        return {"name": self.name, "stored": self._stored.describe(), "written": written}

    def check(self, shape: Shape, where: str) -> None:
        self._stored.check(shape, where)

    def packed_shapes(self, shape: Shape) -> PackedShapes:
        return self._stored.packed_shapes(shape)

    def rows_per_entry(self, tensor_name: str) -> int | None:
        return self._stored.rows_per_entry(tensor_name)

    def shared(self, tensor_name: str) -> bool:
        return self._stored.shared(tensor_name)

    def quantize(self, weight: Tensor, where: str = "weight") -> dict[str, Tensor]:
        raise NotImplementedError("a written weight is only read")

    def dequantize(
        self, packed: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        if isinstance(self._written, torch.dtype):
            weight = live_weight(self._stored, packed, shape, self._adapter, self._written).to(dtype)
        else:
            written = converted(self._stored, packed, shape, self._adapter, self._written, "weight")
            weight = self._written.dequantize(written, shape, dtype)
        return weight if out is None else out.copy_(weight)


def _perplexity(logits: Tensor, ids: list[int]) -> float:
    return float(F.cross_entropy(logits[:-1].double(), torch.tensor(ids[1:])).exp())
