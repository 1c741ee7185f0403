"""The promises that every format keeps: sizes, slices of rows, dtypes, determinism, refusals."""

import json
from math import prod
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_qft.config.schema import LinearFormat, QuantizationConfig
from dist_qft.errors import UserError
from dist_qft.quant import contract
from dist_qft.quant.formats import EMBEDDING, LINEAR, NF4, Q8_0, Affine4, Dense, embedding_format, linear_format

AFFINE4 = [Affine4(block) for block in ((1, 32), (8, 4), (1, 4), (2, 64))]
FORMATS = [NF4(), NF4(32), NF4(64, True), *AFFINE4, Q8_0(), Dense()]
ROW_LOCAL = [format for format in FORMATS if format.row_local]
SHAPE = (48, 192)

each_format = pytest.mark.parametrize("format", FORMATS, ids=lambda format: json.dumps(format.describe()))


def weight_of(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


@each_format
def test_packed_tensors_are_as_announced(format):
    packed = format.quantize(weight_of(SHAPE))
    announced = format.packed_shapes(SHAPE)
    assert list(packed) == list(announced)
    for name, tensor in packed.items():
        shape, dtype = announced[name]
        assert tuple(tensor.shape) == shape
        assert tensor.dtype == (dtype or torch.float32)
        assert tensor.is_contiguous()
        rows = format.rows_per_entry(name)
        assert rows is None or shape[0] * rows == SHAPE[0]
    assert format.bytes_of(SHAPE) == sum(tensor.nbytes for tensor in packed.values())


def test_bytes_per_weight():
    shape = (4096, 4096)
    bits = {format: 8 * format.bytes_of(shape) / prod(shape) for format in FORMATS}
    assert bits[NF4()] == 4.5
    assert bits[NF4(64, True)] == pytest.approx(4.127, abs=1e-3)  # QLoRA, arXiv 2305.14314, section 3
    assert bits[Affine4()] == bits[Affine4((8, 4))] == 5.0
    assert bits[Q8_0()] == 8.5
    assert Dense().bytes_of(shape, dense_element_size=2) == 2 * prod(shape)


@each_format
def test_description_is_json_and_tells_formats_apart(format):
    description = format.describe()
    assert json.loads(json.dumps(description)) == description
    assert [other for other in FORMATS if other.describe() == description] == [format]


@each_format
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_another_dtype_is_the_float32_weight_rounded_once(format, dtype):
    packed = format.quantize(weight_of(SHAPE))
    exact = format.dequantize(packed, SHAPE, torch.float32)
    assert torch.equal(format.dequantize(packed, SHAPE, dtype), exact.to(dtype))


@each_format
def test_dequantize_into_a_given_tensor(format):
    packed = format.quantize(weight_of(SHAPE))
    out = torch.full(SHAPE, torch.nan)
    assert format.dequantize(packed, SHAPE, torch.float32, out=out) is out
    assert torch.equal(out, format.dequantize(packed, SHAPE, torch.float32))


@each_format
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_quantizing_computes_in_float32_whatever_comes_in(format, dtype):
    weight = weight_of(SHAPE).to(dtype)
    packed, expected = format.quantize(weight), format.quantize(weight.float())
    assert all(torch.equal(packed[name].to(expected[name].dtype), expected[name]) for name in expected)


@each_format
def test_quantizing_a_restored_weight_loses_almost_nothing_more(format):
    weight = weight_of(SHAPE)
    once = format.dequantize(format.quantize(weight), SHAPE, torch.float32)
    twice = format.dequantize(format.quantize(once), SHAPE, torch.float32)
    assert (twice - once).abs().mean() <= 0.02 * (once - weight).abs().mean()


@settings(max_examples=60, deadline=None)
@given(
    format=st.sampled_from(ROW_LOCAL), units=st.integers(1, 12), cut=st.tuples(st.integers(0, 12), st.integers(0, 12))
)
def test_a_slice_of_rows_has_the_bits_of_the_whole(format, units, cut):
    shape = (units * format.row_alignment, 128)
    start, stop = sorted(min(end, units) * format.row_alignment for end in cut)
    weight = weight_of(shape, seed=units)
    whole = format.quantize(weight)
    part = format.quantize(weight[start:stop])
    views = format.slice_rows(whole, start, stop)
    assert all(torch.equal(part[name], views[name]) for name in whole)
    if start < stop:
        rows = format.dequantize(views, (stop - start, 128), torch.float32)
        assert torch.equal(rows, format.dequantize(whole, shape, torch.float32)[start:stop])


@each_format
def test_chunks_of_rows_do_not_show(format, monkeypatch):
    weight = weight_of(SHAPE)
    whole = format.quantize(weight)
    exact = format.dequantize(whole, SHAPE, torch.float32)
    monkeypatch.setattr(contract, "CPU_CHUNK", 5 * SHAPE[1])
    chunked = format.quantize(weight)
    assert all(torch.equal(chunked[name], whole[name]) for name in whole)
    assert torch.equal(format.dequantize(whole, SHAPE, torch.float32), exact)
    weight[17, 5] = torch.inf
    with pytest.raises(UserError, match=r"the weight at \[17, 5\] is inf"):
        format.quantize(weight)


def test_double_quantized_constants_are_not_row_local():
    format = NF4(64, double_quant=True)
    assert not format.row_local
    assert format.rows_per_entry("codes") == 1
    assert format.rows_per_entry("absmax_codes") is None


@each_format
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused_with_its_place(format, value):
    weight = weight_of(SHAPE)
    weight[17, 5] = value
    with pytest.raises(UserError) as refused:
        format.quantize(weight, where="model.layers.3.mlp.up_proj.weight")
    expected = f"model.layers.3.mlp.up_proj.weight: the weight at [17, 5] is {value}, must be a finite float32 value"
    assert str(refused.value) == expected
    assert refused.value.exit_code == 2


def test_formats_by_config():
    assert linear_format("nf4") == NF4(64)
    assert linear_format("nf4", [128], True) == NF4(128, True)
    assert linear_format("affine4") == Affine4((1, 32))
    assert linear_format("affine4", [8, 4]) == Affine4((8, 4))
    assert linear_format("dense") == Dense()
    assert embedding_format("q8_0") == Q8_0()
    assert embedding_format("dense") == Dense()
    assert set(LINEAR) == set(get_args(LinearFormat)) - {"auto", "stored"}
    assert set(EMBEDDING) == set(get_args(QuantizationConfig.model_fields["embedding"].annotation)) - {"auto", "stored"}
