"""Attention that is told where samples begin instead of a mask: no (L, L) mask exists, and nothing is computed between
samples.

On CUDA in 16 bits it is flash attention for samples of different lengths, which comes with PyTorch. Everywhere else it
is PyTorch's attention once per sample, whose kernels skip what lies ahead; on CPUs that is the fastest there is.
Registered with transformers under a name of its own, so that a decoder calls it for every layer. Without `segments`, as
in generation, it is transformers' "sdpa" with its masks.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import varlen
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dist_qft.data.segments import Segments

NAME = "dist_qft_segments"
SDPA = "sdpa"
_LAYER_TYPES = ("full_attention", "sliding_attention")
_NOT_HERE = ("softcap", "s_aux", "position_bias")  # what changes scores in ways that only some kernels have
_FLASH_DTYPES = (torch.bfloat16, torch.float16)
_FLASH_HEAD_DIM = 256
_FLASH_MULTIPLE = 8
_NEEDED = {"scale", "window_size"}  # of the arguments of PyTorch's flash attention
_GROUPED = "enable_gqa"
_watching: list[dict[nn.Module, int | None]] = []


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segments: Segments | None = None,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sample, by the interface of transformers' attention functions.

    Args:
        query: (b, heads, L, d). key, value: (b, key heads, L, d).
        segments: the samples; then `attention_mask` is ignored.
        sliding_window: tokens that a token sees, itself included.

    Returns:
        (b, L, heads, d), and None in place of the weights.
    """
    if segments is None:
        if attention_mask is not None and attention_mask.numel() == 1 < query.shape[2]:
            raise ValueError("the decoder does not hand on where samples begin")
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **more)
    if any(more.get(name) is not None for name in _NOT_HERE) or not getattr(module, "is_causal", True):
        raise ValueError("attention with changed scores, or that is not causal, needs a mask")
    for reached in _watching:
        reached[module] = sliding_window
    query, key, value = _as_autocast((query, key, value))
    window = sliding_window if sliding_window is not None and sliding_window < segments.longest else None
    if _has_flash(query, value) and not (segments.whole_rows and window is None):
        return _flash(query, key, value, segments, scaling, window), None
    if segments.whole_rows and window is None:
        return sdpa_attention_forward(module, query, key, value, None, dropout, scaling)
    return _by_sample(module, query, key, value, segments, scaling, window), None


def _as_autocast(tensors: tuple[Tensor, ...]) -> Iterable[Tensor]:
    """The tensors as autocast gives them to PyTorch's attention; it does not know the one for different lengths.

    In a side network rotary embeddings have made float32 of queries and keys.
    """
    if tensors[0].device.type != "cuda" or not torch.is_autocast_enabled("cuda"):
        return tensors
    return (tensor.to(torch.get_autocast_dtype("cuda")) for tensor in tensors)


def _has_flash(query: Tensor, value: Tensor) -> bool:
    if query.device.type != "cuda" or query.dtype not in _FLASH_DTYPES or _NEEDED - _arguments(varlen.varlen_attn):
        return False
    same = query.shape[-1] == value.shape[-1] <= _FLASH_HEAD_DIM
    return same and torch.cuda.get_device_capability(query.device)[0] >= 8


@cache
def _arguments(function: Callable[..., Any]) -> frozenset[str]:
    """The names of what a function may be given. Of PyTorch's attention for different lengths they are other ones in
    each version: 2.10 has neither a scale nor windows, and 2.11 takes fewer heads of keys without being told.
    """
    return frozenset(inspect.signature(function).parameters)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None, window: int | None
) -> Tensor:
    width = query.shape[-1]
    # Zeros change neither scores nor sums. A side network's heads may be as narrow as 4.
    lacking = -width % _FLASH_MULTIPLE
    q, k, v = (F.pad(t, (0, lacking)) if lacking else t for t in (query, key, value))
    q, k, v = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (q, k, v))
    grouped: dict[str, Any] = (
        {_GROUPED: query.shape[1] != key.shape[1]} if _GROUPED in _arguments(varlen.varlen_attn) else {}
    )
    found = varlen.varlen_attn(
        q,
        k,
        v,
        segments.starts,
        segments.starts,
        segments.longest,
        segments.longest,
        scale=width**-0.5 if scaling is None else scaling,
        window_size=(-1 if window is None else window - 1, 0),
        **grouped,
    )
    assert isinstance(found, Tensor), "no auxiliary outputs were asked for"
    return found[..., :width].unflatten(0, (query.shape[0], query.shape[2]))


def _by_sample(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    length = query.shape[2]
    rows: list[list[Tensor]] = [[] for _ in range(segments.rows)]
    for start, stop in zip(segments.bounds, segments.bounds[1:], strict=False):
        row, first = divmod(start, length)
        last = first + stop - start
        q, k, v = (tensor[row : row + 1, :, first:last] for tensor in (query, key, value))
        if window is None or last - first <= window:
            rows[row].append(sdpa_attention_forward(module, q, k, v, None, scaling=scaling, is_causal=True)[0])
        else:
            rows[row] += _windowed(module, q, k, v, scaling, window)
    return torch.cat([torch.cat(pieces, dim=1) for pieces in rows])


def _windowed(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int
) -> list[Tensor]:
    """One sample whose tokens see `window` tokens: as many queries at a time, with a mask of at most twice as many."""
    pieces, length = [], query.shape[2]
    for start in range(0, length, window):
        stop, seen = min(start + window, length), max(start - window + 1, 0)
        ahead = torch.arange(seen, stop, device=query.device) - torch.arange(start, stop, device=query.device)[:, None]
        mask = ((ahead <= 0) & (ahead > -window))[None, None]
        q, k, v = query[:, :, start:stop], key[:, :, seen:stop], value[:, :, seen:stop]
        pieces.append(sdpa_attention_forward(module, q, k, v, mask, scaling=scaling)[0])
    return pieces


def may_take_segments(causal: PreTrainedModel) -> bool:
    """True if a model built for "sdpa" may be given this attention, as far as its configuration tells.

    A family with flash attention has all that attention depends on in the call; another one may have it in the mask.
    """
    config = causal.config.get_text_config()
    types = getattr(config, "layer_types", None) or ()
    return (
        config._attn_implementation == SDPA
        and bool(causal._supports_flash_attn)
        and not getattr(config, "attention_chunk_size", None)
        and all(kind in _LAYER_TYPES for kind in types)
    )


def gives_windows(config: PretrainedConfig, windows: Iterable[int | None]) -> bool:
    """False if a configuration has a sliding window that no attention module is given, so that only its mask has it."""
    text = config.get_text_config()
    types = getattr(text, "layer_types", None)
    sliding = getattr(text, "sliding_window", None) is not None and (types is None or "sliding_attention" in types)
    return not sliding or any(window is not None for window in windows)


@contextmanager
def windows_given() -> Iterator[dict[nn.Module, int | None]]:
    """Collects the attention modules that are called with segments inside, and the window that each is given."""
    reached: dict[nn.Module, int | None] = {}
    _watching.append(reached)
    try:
        yield reached
    finally:
        _watching.remove(reached)


def choose(causal: PreTrainedModel, name: str) -> None:
    """Set a model's attention: NAME, or SDPA, transformers' own."""
    parts: list[PretrainedConfig] = [causal.config, causal.config.get_text_config()]
    for part in parts:
        part._attn_implementation = name


def in_use(config: PretrainedConfig) -> bool:
    """True if a decoder with this configuration takes segments."""
    return config.get_text_config()._attn_implementation == NAME


def library_name(config: PretrainedConfig) -> str:
    """The attention of a configuration as `model.attention` names it."""
    name = str(config._attn_implementation)
    return SDPA if name == NAME else name


def arguments(segments: Segments) -> dict[str, Any]:
    """Keyword arguments of a decoder that say where samples lie.

    The mask says nothing; it is there so that transformers makes none, for which it would look at the position ids, and
    a GPU wait.
    """
    nothing = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=segments.starts.device)
    return {"attention_mask": nothing, "segments": segments}


AttentionInterface.register(NAME, segment_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
