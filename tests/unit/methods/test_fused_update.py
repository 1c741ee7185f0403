"""The expressions of GPUs beside the plain ones, both computed on a CPU: the same to rounding."""

import pytest
import torch
from transformers import Gemma3nTextConfig
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from dist_qft.base_model.fused_norms import fuse_norms, is_fusible
from dist_qft.methods.adapters.fused_update import Update, add_update
from dist_qft.methods.adapters.schedule import TileSettings
from dist_qft.methods.adapters.tile_adapter import TileAdapter
from dist_qft.quant.affine4 import Affine4
from dist_qft.quant.frozen import FrozenLinear
from tests.support.families import FAMILIES, GROUPED, open_base, save_random, tokens_of

ROWS, COLUMNS = 16, 32


@pytest.fixture
def layer():
    layer = FrozenLinear(COLUMNS, ROWS, Affine4((1, 32)), bias=False, dtype=torch.float32, device="cpu")
    layer.load_state_dict(layer.format.quantize(torch.randn(ROWS, COLUMNS)))
    return layer


@pytest.mark.parametrize("alone", [True, False], ids=["gradient of x by both", "by the update"])
@pytest.mark.parametrize(("inner", "pool", "repeat"), [(4, 1, 1), (4, 4, 2), (None, 1, 4), (None, 8, 1)])
def test_update_in_place(layer, alone, inner, pool, repeat):
    sizes = {"in_features": COLUMNS, "out_features": ROWS, "pool": pool, "repeat": repeat, "inner": inner}
    adapter = TileAdapter(TileSettings(**sizes, rank=4, alpha=6.0))
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter)
    settings, gradient = adapter.settings, torch.randn(2, 5, ROWS)
    found = []
    for fused in (True, False):
        x = torch.randn(2, 5, COLUMNS, generator=torch.Generator().manual_seed(0), requires_grad=True)
        y = layer(x)
        if fused:
            update = Update(adapter.A, adapter.B, None, settings.tile_scale, settings.pool, settings.repeat)
            result = add_update(y, x, update, layer if alone else None)
        else:
            result = adapter.add_to(y, x)
        inputs = [x, *adapter.parameters()]
        found.append([result.detach(), *torch.autograd.grad(result, inputs, gradient)])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_norms_by_one_kernel():
    """Those of a kind that PyTorch has; Gemma adds 1 to its weights."""
    plain, other = LlamaRMSNorm(COLUMNS), GemmaRMSNorm(COLUMNS)
    torch.nn.init.normal_(plain.weight)
    x = torch.randn(3, COLUMNS)
    expected = plain(x), other(x)
    fuse_norms(torch.nn.ModuleList([plain, other]))
    assert "forward" in vars(plain) and "forward" not in vars(other)
    torch.testing.assert_close(plain(x), expected[0])
    assert torch.equal(other(x), expected[1])


NORMED = FAMILIES | {
    "gemma3n_text": Gemma3nTextConfig(
        **GROUPED, layer_types=["sliding_attention", "full_attention"], sliding_window=4, num_kv_shared_layers=0
    )
}


@pytest.mark.parametrize("family", NORMED)
@torch.no_grad()
def test_families_with_their_norms_fused(tmp_path_factory, family):
    """As a run on CUDA has them; some of a family's norms have no weight."""
    base = open_base(save_random(NORMED[family], tmp_path_factory.mktemp(family)))
    tokens, positions = tokens_of(2, 12)
    expected = base.hidden_states(tokens, positions)
    fuse_norms(base.decoder)
    torch.testing.assert_close(base.hidden_states(tokens, positions), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
def test_norms_without_a_weight_are_fused_too(tmp_path_factory, family):
    base = open_base(save_random(NORMED[family], tmp_path_factory.mktemp(family)))
    bare = [
        module for module in base.decoder.modules() if "RMSNorm" in type(module).__name__ and not module.state_dict()
    ]
    assert bare and all(map(is_fusible, bare))
