"""`codebook4`: 4-bit floats (E2M1) with a scale per block, as MXFP4 and NVFP4 have them, byte for byte.

    kind             block   block scale        tensor scale
    mxfp4            32      E8M0 (2^(e-127))   none
    nvfp4            16      E4M3               float32 `global`, which multiplies (ModelOpt)
    nvfp4-divided    16      E4M3               float32 `global`, by which the block's scale is divided
                                                (compressed-tensors)

A weight is table[code] * scale: the table is 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. A table has no zero that
could be shifted, so no adapter folds into these. They are only read from files, never quantized into.

A byte of codes is looked up at once in a table of 256 pairs, straight into the result: about as quick as nf4's kernel.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from dist_qft.errors import UserError
from dist_qft.quant.contract import BlockFormat, Format, PackedShapes, Shape

_KINDS = {"mxfp4": 32, "nvfp4": 16, "nvfp4-divided": 16}  # inputs of a block
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Codebook4(BlockFormat):
    """`codes` uint8 (out, in / 2), first weight in the low nibble; `scale` (out, in / block) bytes of E8M0 or E4M3.

    For the NVFP4 kinds also `global` float32 (1,), which all rows share; `by_row` (out, 1), as stacks need it.
    """

    kind: str
    by_row: bool = False
    name: ClassVar[str] = "codebook4"

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise UserError(f"codebook4: got '{self.kind}', must be one of {', '.join(_KINDS)}")
        if self.by_row and self.kind == "mxfp4":
            raise UserError("codebook4: mxfp4 has no tensor scale, which could be by row")

    @property
    def block(self) -> int:
        """Inputs that share a scale."""
        return _KINDS[self.kind]

    def describe(self) -> dict[str, Any]:
        settings = {"name": self.name, "kind": self.kind}
        return settings | {"by_row": True} if self.by_row else settings

    def check(self, shape: Shape, where: str) -> None:
        if shape[1] % self.block:
            raise UserError(f"{where}: {self.kind} needs in_features to be a multiple of {self.block}, got {shape}")

    def packed_shapes(self, shape: Shape) -> PackedShapes:
        out_features, in_features = shape
        shapes: PackedShapes = {
            "codes": ((out_features, in_features // 2), torch.uint8),
            "scale": ((out_features, in_features // self.block), torch.uint8),
        }
        if self.kind != "mxfp4":
            shapes["global"] = ((out_features, 1) if self.by_row else (1,), torch.float32)
        return shapes

    def rows_per_entry(self, tensor_name: str) -> int | None:
        return None if self.shared(tensor_name) else 1

    def shared(self, tensor_name: str) -> bool:
        return tensor_name == "global" and not self.by_row

    @property
    def in_stacks(self) -> Format:
        return self if self.kind == "mxfp4" else Codebook4(self.kind, by_row=True)

    def holds(self, stored: Format) -> bool:
        return stored == self or (self.by_row and stored == Codebook4(self.kind))

    def from_stored(self, packed: Mapping[str, Tensor], stored: Format, where: str) -> dict[str, Tensor]:
        if stored == self:
            return dict(packed)
        return {**packed, "global": packed["global"].expand(len(packed["codes"]), 1).contiguous()}

    def blocks(self, shape: Shape) -> int:
        return shape[0] * shape[1] // self.block

    @property
    def fold_obstacle(self) -> str:
        return "a table of values, which has no zeros to take dW"

    def quantize(self, weight: Tensor, where: str = "weight") -> dict[str, Tensor]:
        raise UserError(f"{where}: {self.name} is only read from files; quantize to nf4 or affine4")

    def _quantize_rows(self, weight: Tensor, where: str) -> dict[str, Tensor]:
        raise NotImplementedError(f"{self.name} is only read")

    def scales(self, packed: Mapping[str, Tensor]) -> Tensor:
        """The factor of each block, float32 (out, in / block): rounded as the library that wrote it rounds it."""
        scale = packed["scale"]
        if self.kind == "mxfp4":
            return _looked_up(scale, _e8m0()) if scale.device.type == "cpu" else powers_of_two(scale)
        factor = packed["global"]
        values = _looked_up(scale, _e4m3()) if scale.device.type == "cpu" else scale.view(torch.float8_e4m3fn).float()
        return values.div_(factor) if self.kind == "nvfp4-divided" else values.mul_(factor)

    def _dequantize_rows(self, packed: Mapping[str, Tensor], out: Tensor) -> None:
        codes, pairs, table = packed["codes"], out.view(torch.int64), _pairs_on(out.device)
        if torch.get_num_threads() == 1:
            torch.index_select(table, 0, codes.reshape(-1).int(), out=pairs.view(-1))
        else:  # a third slower on one thread, but spread over all of them
            torch.gather(table.expand(len(codes), -1), 1, codes.long(), out=pairs)
        out.unflatten(1, (-1, self.block)).mul_(self.scales(packed).unsqueeze(-1))

    def _dequantize_on_cuda(self, packed: Mapping[str, Tensor], out: Tensor) -> None:
        from dist_qft.quant.triton_kernels import dequantize_codebook4

        dequantize_codebook4(packed["codes"], self.scales(packed), self.block, out)


@cache
@torch.inference_mode(False)
def _pairs() -> Tensor:
    """The two values of each byte: pairs of float32, seen as int64."""
    values = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
    byte = torch.arange(256)
    return torch.stack([values[byte & 15], values[byte >> 4]], dim=1).view(torch.int64).squeeze(1)


@cache
@torch.inference_mode(False)
def _pairs_on(device: torch.device) -> Tensor:
    """`_pairs` on a device."""
    return _pairs().to(device)


def _looked_up(scale: Tensor, values: Tensor) -> Tensor:
    """The float32 value of each byte of `scale`, in its shape: a quarter of the time of a conversion on CPUs."""
    return values.index_select(0, scale.view(torch.uint8).flatten().int()).view(scale.shape)


def powers_of_two(scale: Tensor) -> Tensor:
    """2^(e - 127), float32, for each byte e: 0 is the subnormal 2^-127, 255 is NaN."""
    bits = scale.to(torch.int32) << 23
    return bits.masked_fill_(scale == 0, 1 << 22).masked_fill_(scale == 255, 0x7FC00000).view(torch.float32)


@cache
@torch.inference_mode(False)
def _e8m0() -> Tensor:
    """The value of each E8M0 byte, float32."""
    return powers_of_two(torch.arange(256, dtype=torch.uint8))


@cache
@torch.inference_mode(False)
def _e4m3() -> Tensor:
    """The value of each E4M3 byte, float32."""
    return torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
