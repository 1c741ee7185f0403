"""Tile adapters rewritten as plain LoRA pairs of the same dW, and how far the two are apart.

Q-BaRA's and QA-LoRA's dW is a LoRA of rank lambda * r: A' repeats A's columns (divided by p for the mean), B' repeats
B's rows. QA-HiRA's single matrix M is one of rank min(d_out / k, d_in / p): the side with fewer tiles keeps M, the
other becomes a fixed matrix of ones that pools or repeats.
"""

import torch
from torch import Tensor

from dist_qft.merge.difference import Difference
from dist_qft.merge.live_model import LiveModel
from dist_qft.methods.adapters.attach import AdapterSet
from dist_qft.methods.adapters.exact_fold import folded, tile_rows
from dist_qft.methods.adapters.schedule import TileSettings
from dist_qft.methods.adapters.tile_adapter import TileAdapter, lora_factors

# Settings of a plain LoRA, whose alpha has the whole scale in it. A reader adds dW to the base's own zeros: it has no
# rounded ones, as merge-aware training has.
PLAIN = {"pool": 1, "repeat": 1, "dropout": 0.0, "merge_aware": False, "use_rslora": False}


@torch.no_grad()
def equal_lora(adapter: TileAdapter) -> TileAdapter:
    """The adapter of pool 1 and repeat 1, a LoRA, with the same dW."""
    old = adapter.settings
    if adapter.B is not None:
        left, right = lora_factors(adapter)
    elif old.out_features // old.repeat <= old.in_features // old.pool:
        left = adapter.A.repeat_interleave(old.pool, dim=1) * _mean(old)
        right = torch.eye(adapter.A.shape[0], device=left.device).repeat_interleave(old.repeat, dim=0)
    else:
        left = torch.eye(adapter.A.shape[1], device=adapter.A.device).repeat_interleave(old.pool, dim=1) * _mean(old)
        right = adapter.A.repeat_interleave(old.repeat, dim=0)
    rank = left.shape[0]
    # alpha / rank is what PEFT multiplies by: our own scale has the nominal rank below.
    changes = {"rank": rank, "inner": rank, "alpha": old.scale * rank, **PLAIN}
    twin = TileAdapter(old.model_copy(update=changes)).to(left.device)
    first, second = factors(twin)
    first.copy_(left)
    second.copy_(right)
    return twin


def factors(lora: TileAdapter) -> tuple[Tensor, Tensor]:
    """A and B of an adapter that has both."""
    if lora.B is None:
        raise TypeError("a single-matrix adapter has no B")
    return lora.A, lora.B


def lora_twin(adapters: AdapterSet) -> AdapterSet:
    """All adapters as plain LoRAs of one rank and one alpha.

    Readers disagree about layers with others: PEFT takes rank and alpha from patterns, vLLM has one of each for all,
    llama.cpp has one alpha and divides it by the rank of the tensor. They agree where all layers have the same.
    """
    twins = {path: equal_lora(adapter) for path, adapter in adapters.by_path.items()}
    ranks, scales = ({getattr(twin.settings, key) for twin in twins.values()} for key in ("rank", "scale"))
    if len(ranks) == len(scales) == 1:
        return AdapterSet(twins).eval()
    rank = max(ranks)
    scale = next(iter(scales)) if len(scales) == 1 else None
    return AdapterSet({path: _padded(twin, rank, scale) for path, twin in twins.items()}).eval()


@torch.no_grad()
def _padded(lora: TileAdapter, rank: int, scale: float | None) -> TileAdapter:
    """The same dW with zero rows of A and columns of B up to `rank`; without `scale`, its scale goes into B."""
    old, (left, right) = lora.settings, factors(lora)
    alpha = rank * (1.0 if scale is None else scale)
    padded = TileAdapter(old.model_copy(update={"rank": rank, "inner": rank, "alpha": alpha})).to(left.device)
    first, second = factors(padded)
    first.zero_()[: old.rank] = left
    second.zero_()[:, : old.rank] = right if scale is not None else right * old.scale
    return padded


@torch.no_grad()
def lora_difference(live: LiveModel, lora: AdapterSet) -> Difference:
    """The distance of the LoRAs' dW from the one that the live model computes with.

    That is the rounding of A / p to float32, or for merge-aware adapters the rounding of the live model's zeros,
    counted on the part of them that this rank holds.
    """
    difference = Difference()
    for path, adapter in live.adapters.by_path.items():
        old, new = adapter.settings, lora.by_path[path]
        target = live.base.linears[path].format.fold_target if old.merge_aware else None
        if target is not None:
            parameter = getattr(live.base.linears[path], target.tensor)
            part, width = live.engine.local(parameter).view(-1), live.engine.shape(parameter)[1]
            if part.numel():
                in_use, exact = folded(part, live.engine.span(parameter)[0], width, target.block, adapter)
                difference.add(exact, in_use, part)
            continue
        left, right = factors(new)
        product = right.double()[:: old.repeat] @ left.double()[:, :: old.pool]
        exact = tile_rows(adapter, 0, old.out_features // old.repeat)
        difference.add(product * new.settings.scale, exact, torch.zeros_like(exact))
    return difference


def _mean(settings: TileSettings) -> float:
    return 1 / settings.pool if settings.pool_mode == "mean" else 1.0
