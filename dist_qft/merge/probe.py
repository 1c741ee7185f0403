"""A fixed piece of text, and how two models' logits on it differ: what a certificate says about behaviour."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dist_qft.base_model.skeleton import BaseModel
from dist_qft.merge.collective import frozen_weights
from dist_qft.merge.merged_weight import merged_weight
from dist_qft.methods.adapters.tile_adapter import TileAdapter
from dist_qft.quant.contract import Format, Shape
from dist_qft.sharding.host_memory import return_freed_memory
from dist_qft.tuned_model.assemble import Assembled

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

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def probe_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of the probe text."""
    return tokenizer(_TEXT)["input_ids"][:PROBE_TOKENS]


@torch.no_grad()
def logits_of(base: BaseModel, ids: list[int], device: torch.device) -> Tensor:
    """Logits (tokens, vocabulary), float32 on the CPU. Collective if the base is sharded.

    What a layer needed is given back after it: a merge must not take more than a few layers beside the shards.
    """
    hooks = [layer.register_forward_hook(lambda *_: return_freed_memory()) for layer in base.layers]
    try:
        logits = base.model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits
        return logits[0].float().cpu()
    finally:
        for hook in hooks:
            hook.remove()


def compare_logits(live: Tensor, other: Tensor, ids: list[int]) -> LogitDifference:
    distance = (other - live).abs()
    return LogitDifference(
        maximum=float(distance.max()),
        mean=float(distance.mean(dtype=torch.float64)),
        largest_logit=float(live.abs().max()),
        live_perplexity=_perplexity(live, ids),
        perplexity=_perplexity(other, ids),
    )


@contextmanager
def as_written(parts: Assembled, formats: Mapping[str, Format], dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, the base computes with the weights that an inexact merge would write; adapters should be disabled.

    Each weight is converted when it is used, from the gathered tensors: no rank ever holds more than one.

    Args:
        formats: linear layers that are quantized again, and to what.
        dtype: for all other weights: dequantize, add dW, round to this; None leaves them alone.
    """
    adapters = parts.trainables.by_path
    before = {}
    for path, weight in frozen_weights(parts.base).items():
        if path in formats or dtype is not None:
            before[weight] = weight.format
            weight.format = _AsWritten(weight.format, adapters.get(path), formats.get(path), dtype)
    try:
        yield
    finally:
        for weight, format in before.items():
            weight.format = format


class _AsWritten:
    """Stands in for a weight's format and dequantizes to what would be written."""

    def __init__(
        self, format: Format, adapter: TileAdapter | None, new: Format | None, dtype: torch.dtype | None
    ) -> None:
        self._format, self._adapter, self._new, self._dtype = format, adapter, new, dtype

    def __getattr__(self, name: str) -> Any:
        return getattr(self._format, name)

    row_pieces = Format.row_pieces  # of what would be written, by `dequantize` below

    @property
    def row_local(self) -> bool:
        """An adapter's dW belongs to the rows of a whole weight: some rows alone do not say which they are."""
        return self._adapter is None and self._format.row_local

    def dequantize(self, packed: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype) -> Tensor:
        if self._new is None:
            return merged_weight(self._format, packed, shape, self._adapter, self._dtype).to(dtype)
        exact = merged_weight(self._format, packed, shape, self._adapter, torch.float32)
        return self._new.dequantize(self._new.quantize(exact), shape, dtype)


def _perplexity(logits: Tensor, ids: list[int]) -> float:
    return float(F.cross_entropy(logits[:-1].double(), torch.tensor(ids[1:])).exp())
