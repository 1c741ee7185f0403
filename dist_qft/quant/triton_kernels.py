"""Dequantization on CUDA, one Triton kernel for each format but nf4 and dense: packed bytes in, the compute dtype out.

The eager expressions of the formats pass over the weight several times in float32; these read and write it once. The
bits are the same: a code times a scale is exact in float32 (float32 scales of `affine4` keep 20 bits for that), so the
compiler may fuse it with the sum, and the result is rounded to the output's dtype once. Not here: products (the dense
matmul follows) and CPUs.
"""

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 512  # of one row, per program


@triton.jit
def _nibble(codes, row, column, columns, inside, GROUP: tl.constexpr):
    """The 4-bit codes of these columns as float32, from the packing of `nibbles` in groups of GROUP."""
    half: tl.constexpr = GROUP // 2
    byte = tl.load(codes + row * (columns // 2) + column // GROUP * half + column % half, mask=inside, other=0)
    return tl.where(column % GROUP < half, byte & 0x0F, byte >> 4).to(tl.float32)


@triton.jit
def _affine4_kernel(
    codes, scale, zero, out, columns, B_OUT: tl.constexpr, B_IN: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < columns
    nibble = _nibble(codes, row, column, columns, inside, GROUP)
    block = row // B_OUT * (columns // B_IN) + column // B_IN
    factor = tl.load(scale + block, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(zero + block, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * columns + column, (nibble * factor + offset).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _affine4_gathered_kernel(codes, scale, zero, group, out, columns, groups, GROUP: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < columns
    nibble = _nibble(codes, row, column, columns, inside, GROUP)
    block = row * groups + tl.load(group + column, mask=inside, other=0)
    factor = tl.load(scale + block, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(zero + block, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * columns + column, (nibble * factor + offset).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _q8_0_kernel(codes, scale, out, columns, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < columns
    code = tl.load(codes + row * columns + column, mask=inside, other=0).to(tl.float32)
    factor = tl.load(scale + row * (columns // BLOCK) + column // BLOCK, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * columns + column, (code * factor).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _affine8_kernel(codes, scale, zero, out, columns, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < columns
    code = tl.load(codes + row * columns + column, mask=inside, other=0).to(tl.float32)
    block = row * (columns // BLOCK) + column // BLOCK
    factor = tl.load(scale + block, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(zero + block, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * columns + column, (code * factor + offset).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _codebook4_kernel(codes, scale, out, columns, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < columns
    byte = tl.load(codes + row * (columns // 2) + column // 2, mask=inside, other=0)
    nibble = tl.where(column % 2 == 0, byte & 0x0F, byte >> 4).to(tl.int32)
    # E2M1, doubled: the mantissa alone for subnormals, else 2 + mantissa shifted by the exponent.
    exponent = (nibble >> 1) & 3
    mantissa = nibble & 1
    doubled = tl.where(exponent == 0, mantissa, (2 + mantissa) << tl.maximum(exponent - 1, 0))
    value = tl.where(nibble >= 8, -doubled, doubled).to(tl.float32) * 0.5
    factor = tl.load(scale + row * (columns // BLOCK) + column // BLOCK, mask=inside, other=0.0)
    tl.store(out + row * columns + column, (value * factor).to(out.dtype.element_ty), mask=inside)


def dequantize_affine4(packed: Mapping[str, Tensor], block: tuple[int, int], group: int, out: Tensor) -> None:
    """Write the weight into the contiguous `out` (rows, columns) of any float dtype; `group` is the packing's."""
    rows, columns = out.shape
    tensors = [packed[name].contiguous() for name in ("codes", "scale", "zero")]
    _affine4_kernel[_grid(rows, columns)](*tensors, out, columns, *block, group, WIDTH=_COLUMNS)


def dequantize_affine4_gathered(packed: Mapping[str, Tensor], width: int, out: Tensor) -> None:
    """Write the weight into the contiguous `out` (rows, columns) of any float dtype; `width` is the packing's."""
    rows, columns = out.shape
    tensors = [packed[name].contiguous() for name in ("codes", "scale", "zero", "group")]
    groups = tensors[1].shape[1]
    _affine4_gathered_kernel[_grid(rows, columns)](*tensors, out, columns, groups, width, WIDTH=_COLUMNS)


def dequantize_q8_0(packed: Mapping[str, Tensor], block: int, out: Tensor) -> None:
    """Write the weight into the contiguous `out` (rows, columns) of any float dtype."""
    rows, columns = out.shape
    tensors = [packed[name].contiguous() for name in ("codes", "scale")]
    _q8_0_kernel[_grid(rows, columns)](*tensors, out, columns, block, WIDTH=_COLUMNS)


def dequantize_affine8(packed: Mapping[str, Tensor], block: int, out: Tensor) -> None:
    """Write the weight into the contiguous `out` (rows, columns) of any float dtype."""
    rows, columns = out.shape
    tensors = [packed[name].contiguous() for name in ("codes", "scale", "zero")]
    _affine8_kernel[_grid(rows, columns)](*tensors, out, columns, block, WIDTH=_COLUMNS)


def dequantize_codebook4(codes: Tensor, scale: Tensor, block: int, out: Tensor) -> None:
    """Write the weight into the contiguous `out` (rows, columns) of any float dtype; `scale` is float32 per block."""
    rows, columns = out.shape
    _codebook4_kernel[_grid(rows, columns)](codes.contiguous(), scale.contiguous(), out, columns, block, WIDTH=_COLUMNS)


def _grid(rows: int, columns: int) -> tuple[int, int]:
    return rows, triton.cdiv(columns, _COLUMNS)
