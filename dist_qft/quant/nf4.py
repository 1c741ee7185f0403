"""`nf4`: the 4-bit NormalFloat of QLoRA (arXiv 2305.14314, section 3), by the kernels of bitsandbytes.

With quantized constants a kernel of our own dequantizes on CUDA, with the same bits: `triton_kernels`.

Bits equal those of `bitsandbytes.functional.quantize_4bit`, on CPUs by a faster method (`nf4_codes`). Only the storage
differs: plain named tensors instead of a `Params4bit` with a separate quantization state, so that the constants are
sharded like the codes.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from dist_qft.errors import UserError
from dist_qft.quant.contract import Format, PackedShapes, Shape, finite_rows, row_chunks
from dist_qft.quant.nf4_codes import quantize_blocks
from dist_qft.quant.triton_here import triton_obstacle

# bitsandbytes also takes 2048 and 4096, but dequantizes them on AVX-512 machines through torch.compile, anew for each
# shape and half a minute each.
BLOCKS = (32, 64, 128, 256, 512, 1024)
CONSTANT_BLOCK = 256  # block constants that share an 8-bit scale
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Up to so many rows bitsandbytes' product reads the codes themselves on every GPU. For more it may choose to dequantize
# first, which takes it three kernels and `dequantize` one.
_FEW_ROWS = 4
_LOADED = 16  # bytes that its kernel loads at once


@dataclass(frozen=True)
class NF4(Format):
    """w = codebook[q] * absmax, in blocks of consecutive inputs that never cross a row.

    `codes` uint8 (out, in / 2), first weight in the high nibble; `absmax` float32 (out, in / block). With
    `double_quant` the absmax, n = out * in / block of them, become `absmax_codes` uint8 (n,), `absmax_absmax` float32
    (ceil(n / 256),) and `absmax_offset` float32 (1,), their mean: no slice of rows determines these.
    """

    block: int = 64
    double_quant: bool = False
    name: ClassVar[str] = "nf4"

    def __post_init__(self) -> None:
        if self.block not in BLOCKS:
            raise UserError(f"quantization.block: got [{self.block}], must be one of {_listed(BLOCKS)} for nf4")

    @property
    def row_local(self) -> bool:
        return not self.double_quant

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "block": self.block, "double_quant": self.double_quant}

    def check(self, shape: Shape, where: str) -> None:
        in_features = shape[1]
        if in_features % self.block:
            legal = _listed(block for block in BLOCKS if in_features % block == 0) or "affine4, or exempt it"
            raise UserError(
                f"{where}: nf4 block {self.block} does not divide in_features {in_features} "
                f"of a weight of shape {shape}; must be {legal}"
            )

    def packed_shapes(self, shape: Shape) -> PackedShapes:
        out_features, in_features = shape
        codes: PackedShapes = {"codes": ((out_features, in_features // 2), torch.uint8)}
        if not self.double_quant:
            return codes | {"absmax": ((out_features, in_features // self.block), torch.float32)}
        blocks = out_features * in_features // self.block
        return codes | {
            "absmax_codes": ((blocks,), torch.uint8),
            "absmax_absmax": ((-(-blocks // CONSTANT_BLOCK),), torch.float32),
            "absmax_offset": ((1,), torch.float32),
        }

    def rows_per_entry(self, tensor_name: str) -> int | None:
        return None if tensor_name.startswith("absmax_") else 1

    def shared(self, tensor_name: str) -> bool:
        return tensor_name in ("absmax_absmax", "absmax_offset")

    @property
    def row_format(self) -> "NF4 | None":
        return NF4(self.block) if self.double_quant else None

    def second_pass(self, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        absmax = packed["absmax"].flatten()
        with _one_thread():
            offset = absmax.mean()
        codes, state = _bitsandbytes().quantize_blockwise(
            absmax - offset, code=dynamic_map(absmax.device), blocksize=CONSTANT_BLOCK
        )
        return {"absmax_codes": codes, "absmax_absmax": state.absmax, "absmax_offset": offset.view(1)}

    def blocks(self, shape: Shape) -> int:
        return shape[0] * shape[1] // self.block

    def quantize(self, weight: Tensor, where: str = "weight") -> dict[str, Tensor]:
        bnb = _bitsandbytes()
        out_features, in_features = weight.shape
        self.check((out_features, in_features), where)
        codes = torch.empty((out_features, in_features // 2), dtype=torch.uint8, device=weight.device)
        absmax = torch.empty((out_features, in_features // self.block), dtype=torch.float32, device=weight.device)
        for rows in row_chunks((out_features, in_features), weight.device):
            chunk = finite_rows(weight, rows, where)
            if chunk.device.type == "cpu":
                codes[rows], absmax[rows] = quantize_blocks(chunk, self.block, codebook)
                continue
            chunk_codes, state = bnb.quantize_4bit(chunk, blocksize=self.block, quant_type="nf4")
            codes[rows] = chunk_codes.view(-1, in_features // 2)
            absmax[rows] = state.absmax.view(-1, in_features // self.block)
        if not self.double_quant:
            return {"codes": codes, "absmax": absmax}
        return {"codes": codes, **self.second_pass({"absmax": absmax})}

    def row_part(self, packed: Mapping[str, Tensor], shape: Shape, start: int, stop: int) -> dict[str, Tensor]:
        per_row = shape[1] // self.block
        first, last = start * per_row, stop * per_row
        begin, end = first // CONSTANT_BLOCK, -(-last // CONSTANT_BLOCK)  # blocks of constants around those of the rows
        around = {
            "absmax_codes": packed["absmax_codes"][begin * CONSTANT_BLOCK : end * CONSTANT_BLOCK],
            "absmax_absmax": packed["absmax_absmax"][begin:end],
            "absmax_offset": packed["absmax_offset"],
        }
        absmax = self._absmax(around)[first - begin * CONSTANT_BLOCK :][: last - first]
        return {"codes": packed["codes"][start:stop], "absmax": absmax.view(-1, per_row)}

    def dequantize(
        self, packed: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        device = packed["codes"].device
        if self.double_quant and device.type == "cuda" and packed["codes"].numel() and triton_obstacle() is None:
            # By bitsandbytes it is three kernels, and the constants make a way through memory of their own.
            from dist_qft.quant.triton_kernels import dequantize_nf4_nested

            out = torch.empty(shape, dtype=dtype, device=device) if out is None else out
            dequantize_nf4_nested(packed, self.block, CONSTANT_BLOCK, dynamic_map(device), codebook_on(device), out)
            return out
        bnb = _bitsandbytes()
        # On CPUs with AVX-512 it rounds a float16 half-way between two upwards, and not to the even one.
        kernel_dtypes = _KERNEL_DTYPES if device.type == "cuda" else _KERNEL_DTYPES[:2]
        state = bnb.QuantState(
            absmax=self._absmax(packed),
            shape=shape,
            dtype=dtype if dtype in kernel_dtypes else torch.float32,
            blocksize=self.block,
            quant_type="nf4",
        )
        # As a column, the shape in which bitsandbytes packs: it takes a single row of codes for a transposed weight.
        weight = bnb.dequantize_4bit(packed["codes"].view(-1, 1), state)
        return weight.to(dtype) if out is None else out.copy_(weight)

    def few_rows(self, dtype: torch.dtype) -> int:
        return _FEW_ROWS if dtype in _KERNEL_DTYPES else 0

    def product(self, packed: Mapping[str, Tensor], shape: Shape, x: Tensor, bias: Tensor | None) -> Tensor:
        """The same in bitsandbytes' kernel. In 16 bits it rounds codebook, absmax, weights and their products with x to
        x's dtype, and sums in float32; `dequantize` rounds a weight once, and products are then exact.
        """
        from bitsandbytes import matmul_4bit

        bnb = _bitsandbytes()
        # bitsandbytes 0.49 reads the code of a single row's product here, later versions know it.
        state = bnb.QuantState(packed.get("absmax"), shape, codebook_on(x.device), self.block, "nf4", x.dtype)
        if self.double_quant:
            state.absmax, state.offset, state.nested = packed["absmax_codes"], packed["absmax_offset"].view(()), True
            state.state2 = bnb.QuantState(
                packed["absmax_absmax"], None, dynamic_map(x.device), CONSTANT_BLOCK, None, torch.float32
            )
        # As a row, in which shape each version of bitsandbytes reads the codes by rows of the weight.
        return matmul_4bit(_aligned(x), _aligned(packed["codes"]).view(1, -1), state, bias=bias)

    def _absmax(self, packed: Mapping[str, Tensor]) -> Tensor:
        if not self.double_quant:
            return packed["absmax"]
        codes = packed["absmax_codes"]
        absmax = _bitsandbytes().dequantize_blockwise(
            codes, absmax=packed["absmax_absmax"], code=dynamic_map(codes.device), blocksize=CONSTANT_BLOCK
        )
        return absmax.add_(packed["absmax_offset"])


def _aligned(tensor: Tensor) -> Tensor:
    """A tensor that bitsandbytes' kernel may load: contiguous, at a multiple of `_LOADED` bytes."""
    aligned = tensor.storage_offset() * tensor.itemsize % _LOADED == 0
    return tensor.contiguous() if aligned else tensor.clone(memory_format=torch.contiguous_format)


@cache
def _bitsandbytes() -> ModuleType:
    """bitsandbytes.functional, imported at first use: it costs seconds, which `validate` need not pay."""
    # On AVX512-BF16 machines the import warns that an optional inference kernel, unused here, is not installed.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import bitsandbytes.functional

    return bitsandbytes.functional


@cache
@torch.inference_mode(False)
def codebook() -> Tensor:
    """The 16 values of the 4-bit type, float32."""
    return _bitsandbytes().get_4bit_type("nf4", "cpu")


@cache
@torch.inference_mode(False)
def codebook_on(device: torch.device) -> Tensor:
    """`codebook` on a device."""
    return codebook().to(device)


@cache
@torch.inference_mode(False)
def dynamic_map(device: torch.device) -> Tensor:
    """The 256 values of the 8-bit dynamic type (arXiv 2110.02861) that store the double-quantized constants.

    bitsandbytes' `create_dynamic_map` as CPUs with fused multiply-add compute it. It calls `torch.linspace`, whose last
    bits differ between kinds of CPUs; these are the same everywhere.
    """
    positive = []
    for exponent in range(-6, 1):
        steps = _evenly_spaced(0.1, 1.0, 2 ** (exponent + 6))
        positive.append((steps[:-1] + steps[1:]) / 2 * 10**exponent)
    values = torch.cat(positive)
    return torch.cat([values, -values, torch.tensor([0.0, 1.0])]).sort().values.to(device)


def _evenly_spaced(first: float, last: float, intervals: int) -> Tensor:
    """The ends of so many equal intervals, float32 (intervals + 1,), counted from the nearer end and rounded once."""
    low, high = torch.tensor([first, last], dtype=torch.float32)
    width = ((high - low) / intervals).double()
    index, middle = torch.arange(intervals + 1, dtype=torch.float64), (intervals + 1) // 2
    from_low, from_high = low.double() + width * index, high.double() - width * index.flip(0)
    return torch.cat([from_low[:middle], from_high[middle:]]).float()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run the body on one thread: sums then have one order, and the same bits, whatever the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _listed(blocks: Iterable[int]) -> str:
    return ", ".join(map(str, blocks))
