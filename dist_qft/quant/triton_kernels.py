"""Dequantization on CUDA, one Triton kernel for each format but plain nf4 and dense: packed bytes in, the compute dtype
out.

The eager expressions of the formats pass over the weight several times in float32; these read and write it once. The
bits are the same: a code times a scale is exact in float32 (float32 scales of `affine4` keep 20 bits for that), so the
compiler may fuse it with the sum, and the result is rounded to the output's dtype once. Not here: products (the dense
matmul follows) and CPUs. Only nf4's constants are a product and a sum that both round: its kernel is compiled without
fusing them.

A program has WIDTH columns of one row, as (chunks, CHUNK). The columns of a chunk share a block, whose constants are
loaded once for them. A chunk is what a thread stores at once, 16 bytes, or less where blocks are narrower.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_THREADS = 128
_STORED = 16  # bytes that a thread stores at once


@triton.jit
def _columns(WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """This program's columns (chunks, CHUNK), and the first of each chunk (chunks, 1)."""
    first = (tl.program_id(1) * WIDTH + tl.arange(0, WIDTH // CHUNK) * CHUNK)[:, None]
    return first + tl.arange(0, CHUNK)[None, :], first


@triton.jit
def _nibble(codes, row, column, columns, inside, GROUP: tl.constexpr):
    """The 4-bit codes of these columns as float32, from the packing of `nibbles` in groups of GROUP."""
    half: tl.constexpr = GROUP // 2
    byte = tl.load(codes + row * (columns // 2) + column // GROUP * half + column % half, mask=inside, other=0)
    return tl.where(column % GROUP < half, byte & 0x0F, byte >> 4).to(tl.float32)


@triton.jit
def _adjacent(codes, row, columns, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """The bytes of this program's columns, two of which share one: (chunks, CHUNK / 2)."""
    first = (tl.program_id(1) * WIDTH + tl.arange(0, WIDTH // CHUNK) * CHUNK)[:, None]
    pair = first // 2 + tl.arange(0, CHUNK // 2)[None, :]
    return tl.load(codes + row * (columns // 2) + pair, mask=pair < columns // 2, other=0)


@triton.jit
def _affine4_kernel(
    codes,
    scale,
    zero,
    out,
    columns,
    B_OUT: tl.constexpr,
    B_IN: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column, first = _columns(WIDTH, CHUNK)
    inside = column < columns
    nibble = _nibble(codes, row, column, columns, inside, GROUP)
    block = row // B_OUT * (columns // B_IN) + first // B_IN
    factor = tl.load(scale + block, mask=first < columns, other=0.0).to(tl.float32)
    offset = tl.load(zero + block, mask=first < columns, other=0.0).to(tl.float32)
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
def _q8_0_kernel(codes, scale, out, columns, BLOCK: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column, first = _columns(WIDTH, CHUNK)
    inside = column < columns
    code = tl.load(codes + row * columns + column, mask=inside, other=0).to(tl.float32)
    block = row * (columns // BLOCK) + first // BLOCK
    factor = tl.load(scale + block, mask=first < columns, other=0.0).to(tl.float32)
    tl.store(out + row * columns + column, (code * factor).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _affine8_kernel(codes, scale, zero, out, columns, BLOCK: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column, first = _columns(WIDTH, CHUNK)
    inside = column < columns
    code = tl.load(codes + row * columns + column, mask=inside, other=0).to(tl.float32)
    block = row * (columns // BLOCK) + first // BLOCK
    factor = tl.load(scale + block, mask=first < columns, other=0.0).to(tl.float32)
    offset = tl.load(zero + block, mask=first < columns, other=0.0).to(tl.float32)
    tl.store(out + row * columns + column, (code * factor + offset).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _codebook4_kernel(codes, scale, out, columns, BLOCK: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column, first = _columns(WIDTH, CHUNK)
    inside = column < columns
    byte = _adjacent(codes, row, columns, WIDTH, CHUNK)
    nibble = tl.interleave(byte & 0x0F, byte >> 4).to(tl.int32)
    # E2M1, doubled: the mantissa alone for subnormals, else 2 + mantissa shifted by the exponent.
    exponent = (nibble >> 1) & 3
    mantissa = nibble & 1
    doubled = tl.where(exponent == 0, mantissa, (2 + mantissa) << tl.maximum(exponent - 1, 0))
    value = tl.where(nibble >= 8, -doubled, doubled).to(tl.float32) * 0.5
    block = row * (columns // BLOCK) + first // BLOCK
    factor = tl.load(scale + block, mask=first < columns, other=0.0)
    tl.store(out + row * columns + column, (value * factor).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _nf4_nested_kernel(
    codes,
    absmax_codes,
    absmax_absmax,
    absmax_offset,
    dynamic,
    codebook,
    out,
    columns,
    BLOCK: tl.constexpr,
    SHARED: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column, first = _columns(WIDTH, CHUNK)
    inside = column < columns
    byte = _adjacent(codes, row, columns, WIDTH, CHUNK)
    value = tl.load(codebook + tl.interleave(byte >> 4, byte & 0x0F).to(tl.int32))
    block = row * (columns // BLOCK) + first // BLOCK
    level = tl.load(dynamic + tl.load(absmax_codes + block, mask=first < columns, other=0).to(tl.int32))
    factor = tl.load(absmax_absmax + block // SHARED, mask=first < columns, other=0.0)
    absmax = level * factor + tl.load(absmax_offset)
    tl.store(out + row * columns + column, (value * absmax).to(out.dtype.element_ty), mask=inside)


def dequantize_affine4(packed: Mapping[str, Tensor], block: tuple[int, int], group: int, out: Tensor) -> None:
    """Write the weight into the contiguous `out` (rows, columns) of any float dtype; `group` is the packing's."""
    tensors = [packed[name].contiguous() for name in ("codes", "scale", "zero")]
    _launch(_affine4_kernel, tensors, out, *block, group, **sizes(out.dtype, block[1]))


def dequantize_affine4_gathered(packed: Mapping[str, Tensor], width: int, out: Tensor) -> None:
    """Write the weight into the contiguous `out` (rows, columns) of any float dtype; `width` is the packing's."""
    tensors = [packed[name].contiguous() for name in ("codes", "scale", "zero", "group")]
    groups = tensors[1].shape[1]
    _launch(_affine4_gathered_kernel, tensors, out, groups, width, WIDTH=_width(out.dtype))


def dequantize_q8_0(packed: Mapping[str, Tensor], block: int, out: Tensor) -> None:
    """Write the weight into the contiguous `out` (rows, columns) of any float dtype."""
    tensors = [packed[name].contiguous() for name in ("codes", "scale")]
    _launch(_q8_0_kernel, tensors, out, block, **sizes(out.dtype, block))


def dequantize_affine8(packed: Mapping[str, Tensor], block: int, out: Tensor) -> None:
    """Write the weight into the contiguous `out` (rows, columns) of any float dtype."""
    tensors = [packed[name].contiguous() for name in ("codes", "scale", "zero")]
    _launch(_affine8_kernel, tensors, out, block, **sizes(out.dtype, block))


def dequantize_codebook4(codes: Tensor, scale: Tensor, block: int, out: Tensor) -> None:
    """Write the weight into the contiguous `out` (rows, columns) of any float dtype; `scale` is float32 per block."""
    tensors = codes.contiguous(), scale.contiguous()
    _launch(_codebook4_kernel, tensors, out, block, **sizes(out.dtype, block))


def dequantize_nf4_nested(
    packed: Mapping[str, Tensor], block: int, shared: int, dynamic: Tensor, codebook: Tensor, out: Tensor
) -> None:
    """Write a weight whose constants are quantized, too, into the contiguous `out` (rows, columns) of any float dtype.

    Args:
        block: inputs that share an absmax. shared: absmax that share one of their own.
        dynamic: the 256 values of the codes of absmax. codebook: the 16 values of the codes. Both float32.
    """
    names = ("codes", "absmax_codes", "absmax_absmax", "absmax_offset")
    tensors = [*(packed[name].contiguous() for name in names), dynamic, codebook]
    _launch(_nf4_nested_kernel, tensors, out, block, shared, **sizes(out.dtype, block), enable_fp_fusion=False)


def _launch(kernel: Any, tensors: Sequence[Tensor], out: Tensor, *numbers: int, **constants: int) -> None:
    """Run a kernel over the rows of `out`, on its device: Triton takes the current one, which may be another."""
    with torch.cuda.device_of(out):
        kernel[_grid(out)](*tensors, out, out.shape[1], *numbers, **constants)


def sizes(dtype: torch.dtype, block: int) -> dict[str, int]:
    """WIDTH and CHUNK of a kernel that writes `dtype`, for blocks of so many columns."""
    width = _width(dtype)
    return {"WIDTH": width, "CHUNK": min(block & -block, width // _THREADS)}


def _width(dtype: torch.dtype) -> int:
    return _THREADS * _STORED // dtype.itemsize


def _grid(out: Tensor) -> tuple[int, int]:
    return out.shape[0], triton.cdiv(out.shape[1], _width(out.dtype))
