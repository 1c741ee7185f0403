"""Packed samples that only a mask keeps apart, in steps from the hidden-state cache."""

from functools import partial

import numpy as np
import torch
from transformers import OPTConfig

from dist_qft.base_model.family import packed_mask
from dist_qft.data.batches import MicroBatch
from dist_qft.methods.qst.cached_forward import CachedForward
from dist_qft.methods.qst.hidden_cache import CacheLayout, HiddenCache
from dist_qft.methods.qst.network import BaseStates, SideNetwork
from dist_qft.methods.qst.settings import SideSettings
from dist_qft.methods.qst.sizes import shrunken_config

CPU, DEPTH, WIDTH, LENGTH = torch.device("cpu"), 4, 64, 12


def of_opt() -> OPTConfig:
    sizes = {"hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "ffn_dim": 128, "num_hidden_layers": DEPTH - 1}
    config = OPTConfig(**sizes, num_attention_heads=4, vocab_size=50, init_std=0.1, dropout=0.0, attention_dropout=0.0)
    config._attn_implementation = "eager"
    return config


def test_a_sample_does_not_see_the_one_before_it(tmp_path):
    """As in a step through the base: OPT does not look at positions, and eager attention takes no segments."""
    config = of_opt()
    settings = SideSettings(reduction=4, downsample="adapter", downsample_rank=8, compat="paper")
    side = SideNetwork.build(settings, shrunken_config(config, 4), width=WIDTH, out_width=WIDTH, seed=0).eval()
    torch.nn.init.constant_(side.alpha, 0.0)  # all of the side network, none of the base
    layout = CacheLayout(DEPTH, WIDTH, WIDTH, "none", torch.float32)
    cache = HiddenCache(tmp_path, layout, np.array([LENGTH, LENGTH]), rank=0, states_of={"base": "b"})
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(1, LENGTH, WIDTH, generator=generator).repeat(2, 1, 1) for _ in range(DEPTH)]
    last = torch.randn(1, LENGTH, WIDTH, generator=generator).repeat(2, 1, 1)
    for layer in layers:
        layer[1, : LENGTH // 2] += 1.0  # another first sample in the second row
    cache.write([0, 1], BaseStates(layers, last))
    positions = torch.arange(LENGTH // 2).repeat(1, 2)
    ids = torch.zeros(1, LENGTH, dtype=torch.long)

    mask = partial(packed_mask, config, dtype=torch.float32)
    forward = CachedForward(lambda batch: None, side, cache, CPU, lambda: None, mask)
    forward._cached = True
    with torch.no_grad():
        one, other = (forward(MicroBatch.of(ids, ids, positions, 0, (row,))) for row in (0, 1))
    assert not torch.equal(one[:, : LENGTH // 2], other[:, : LENGTH // 2])
    assert torch.equal(one[:, LENGTH // 2 :], other[:, LENGTH // 2 :])
