"""The arithmetic of folding, against float64 and against adapters' exact dW."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dist_qft.errors import UserError
from dist_qft.merge.difference import Difference
from dist_qft.merge.merged_weight import live_weight, require_range, update_rows
from dist_qft.merge.probe import as_written
from dist_qft.methods.adapters.exact_fold import folded, folding_obstacle, tile_rows
from dist_qft.methods.adapters.schedule import TileSettings
from dist_qft.methods.adapters.tile_adapter import TileAdapter, exact_dW, tile_values
from dist_qft.quant import contract, frozen
from dist_qft.quant.affine4 import Affine4
from dist_qft.quant.dense import Dense
from dist_qft.quant.frozen import FrozenLinear
from dist_qft.quant.nf4 import NF4

OUT, IN = 1040, 128  # more tile rows than are multiplied at a time


def random_adapter(pool: int, repeat: int, inner: int | None = 8, **changes: object) -> TileAdapter:
    settings = {"in_features": IN, "out_features": OUT, "rank": 4, "alpha": 6.0, **changes}
    adapter = TileAdapter(TileSettings(pool=pool, repeat=repeat, inner=inner, **settings))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapter


def random_weight() -> torch.Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(4))


def float64_weight(packed: dict[str, torch.Tensor], zero: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """scale * q + zero in float64, with the codes read off the float32 dequantization of scale 1 and zero 0."""
    plain = {**packed, "scale": torch.ones_like(packed["scale"]), "zero": torch.zeros_like(packed["zero"])}
    codes = Affine4(block).dequantize(plain, (OUT, IN), torch.float32).double()
    ones = torch.ones(block, dtype=torch.float64)
    return torch.kron(packed["scale"].double(), ones) * codes + torch.kron(zero.double(), ones)


CASES = [((1, 32), 32, 1, 8), ((1, 32), 64, 2, None), ((8, 4), 4, 8, None), ((2, 16), 32, 26, 8), ((1, 1), 1, 1, 8)]


@pytest.mark.parametrize(("block", "pool", "repeat", "inner"), CASES)
@pytest.mark.parametrize("pool_mode", ["mean", "sum"])
def test_the_folded_weight_is_the_weight_plus_dW(block, pool, repeat, inner, pool_mode):
    adapter = random_adapter(pool, repeat, inner, pool_mode=pool_mode)
    packed = Affine4(block).quantize(random_weight())
    zero = packed["zero"]
    written, exact = folded(zero.view(-1), 0, zero.shape[1], block, adapter)
    expected = float64_weight(packed, zero, block) + exact_dW(adapter)
    torch.testing.assert_close(float64_weight(packed, exact.view_as(zero), block), expected, rtol=0, atol=1e-12)
    difference = Difference()
    difference.add_fold(zero.view(-1), written, exact)
    assert 0.4 < difference.steps <= 0.5
    rounding = (written.double() - exact).norm() / (exact - zero.view(-1).double()).norm()
    assert difference.share_of_update == pytest.approx(float(rounding))
    assert difference.maximum == float((written.double() - exact).abs().max())


@pytest.mark.parametrize("cuts", [[0, 4160], [0, 1, 17, 400, 2000, 4160], [0, 2080, 4160], [0, 4096, 4160]])
def test_parts_folded_alone_have_the_bits_of_the_whole(cuts):
    adapter = random_adapter(32, 1)
    zero = random_weight()[:, :4].half().reshape(-1)
    whole, _ = folded(zero, 0, 4, (1, 32), adapter)
    parts = [folded(zero[a:b], a, 4, (1, 32), adapter)[0] for a, b in itertools.pairwise(cuts)]
    assert torch.equal(torch.cat(parts).view(torch.int16), whole.view(torch.int16))


def test_sums_are_rounded_once():
    """1 + 2^-11 + 2^-40: float32 would drop the last bit and leave a tie, which goes to 1."""
    settings = TileSettings(in_features=1, out_features=1, pool=1, repeat=1, rank=1, alpha=1.0, inner=None)
    adapter = TileAdapter(settings)
    adapter.A.data.fill_(2.0**-11 + 2.0**-34)
    one = torch.ones(1, dtype=torch.float16)
    written, exact = folded(one, 0, 1, (1, 1), adapter)
    assert exact.item() == 1 + 2.0**-11 + 2.0**-34
    assert exact.half().item() == 1.0
    assert written.item() == 1 + 2.0**-10


def test_float16_steps_are_those_of_numpy():
    written = torch.tensor([1.0, -0.25, 0.3, 0.0, 6e-8, 6.2e-5, 6.0e-5, 65000.0], dtype=torch.float16)
    step = np.spacing(np.abs(written.numpy())).astype(np.float64)
    step[-1] = 32.0  # above 32768
    for fraction in (0.25, 0.5, 2.0):
        difference = Difference()
        difference.add_fold(written, written, written.double() + fraction * torch.from_numpy(step))
        assert difference.steps == fraction


@pytest.mark.parametrize(("pool", "repeat", "inner"), [(1, 1, 4), (2, 2, 8), (32, 1, 4), (4, 8, None)])
def test_rows_of_dW(pool, repeat, inner):
    adapter = random_adapter(pool, repeat, inner)
    torch.testing.assert_close(tile_rows(adapter, 0, OUT // repeat), tile_values(adapter), rtol=1e-13, atol=0)
    for start, stop in ((0, OUT), (3, 5), (500, 1031), (1039, 1040)):
        torch.testing.assert_close(update_rows(adapter, start, stop), exact_dW(adapter)[start:stop], rtol=1e-13, atol=0)


@pytest.mark.parametrize("format", [NF4(), NF4(double_quant=True), Affine4((8, 4)), Dense()], ids=str)
def test_merged_weights_are_dequantized_weights_plus_dW(format):
    adapter = random_adapter(2, 2)
    packed = format.quantize(random_weight())
    dequantized = format.dequantize(packed, (OUT, IN), torch.float32).double()
    merged = live_weight(format, packed, (OUT, IN), adapter, torch.float64)
    torch.testing.assert_close(merged, dequantized + exact_dW(adapter), rtol=1e-13, atol=1e-15)
    assert torch.equal(live_weight(format, packed, (OUT, IN), None, torch.float64), dequantized)


@pytest.mark.parametrize(
    ("format", "repeat", "pool", "message"),
    [
        (Affine4((8, 4)), 8, 4, None),
        (Affine4((8, 4)), 16, 128, None),
        (Affine4((1, 32)), 1, 32, None),
        (Dense(), 1, 1, None),
        (Affine4((8, 4)), 4, 4, "blocks of [8, 4] cross the tiles of q: repeat 4 is not a multiple of 8 (nearest: "),
        (Affine4((1, 32)), 1, 48, "pool 48 is not a multiple of 32 (nearest: 32 or 64)"),
        (Affine4((8, 4)), 12, 2, "(nearest: 8 or 16); pool 2 is not a multiple of 4 (nearest: 4 or 8)"),
        (NF4(), 1, 32, "q is nf4, which has no zeros to take dW; choose quantization.linear: affine4"),
    ],
    ids=str,
)
def test_folds_only_where_blocks_lie_inside_tiles(format, repeat, pool, message):
    layer = FrozenLinear(384, 96, format, bias=False, dtype=torch.float32)
    settings = random_adapter(pool, repeat, in_features=384, out_features=96).settings
    found = folding_obstacle({"q": settings}, {"q": layer})
    assert found is None if message is None else message in found


def test_zeros_beyond_float16_are_refused():
    adapter = random_adapter(32, 1)
    adapter.B.data.fill_(1e8)
    zero = torch.zeros(OUT * 4, dtype=torch.float16)
    with pytest.raises(UserError, match=r"^q: merged values up to \S+ leave the range of float16; "):
        require_range(*folded(zero, 0, 4, (1, 32), adapter), "q")


@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize(("new", "dtype"), [(None, torch.bfloat16), (NF4(64), None)])
def test_a_layer_larger_than_a_piece_computes_with_the_weight_that_would_be_written(monkeypatch, adapted, new, dtype):
    """A forward pass takes large weights a few rows at a time; an adapter's rows must be those of the whole."""
    format = Affine4((1, 32))
    layer = FrozenLinear(IN, OUT, format, False, torch.float32, "cpu")
    packed = format.quantize(random_weight())
    for name, tensor in packed.items():
        layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    adapter = random_adapter(pool=4, repeat=8) if adapted else None
    expected = live_weight(format, packed, (OUT, IN), adapter, dtype or torch.float32).float()
    if new is not None:
        expected = new.dequantize(new.quantize(expected), (OUT, IN), torch.float32)
    x = torch.randn(3, IN, generator=torch.Generator().manual_seed(5))
    for module in (contract, frozen):
        monkeypatch.setattr(module, "CPU_CHUNK", 100 * IN)
    assert layer.in_pieces
    adapters = SimpleNamespace(by_path={"layer": adapter} if adapted else {})
    parts = SimpleNamespace(weights=lambda: {"layer": layer}, adapters=adapters)
    with as_written(parts, {"layer": new} if new else {}, dtype):
        torch.testing.assert_close(layer(x), x @ expected.T, rtol=1e-5, atol=1e-5)
