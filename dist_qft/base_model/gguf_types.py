"""GGUF's tensor types as our formats: each value the same as in ggml, whatever the packing.

`raw` is uint8 (rows, bytes of a row). Layouts are those of ggml's `ggml-common.h`. A type is held

* as `affine4` if its weights are scale * q + zero with 4 bits or less: Q4_1 (its own twin), Q4_0 (zero = -8 scale,
  exact in float16), Q4_K and Q2_K (products of a float16 and a small integer: float32 constants);
* as `affine8` if they are that with more bits: Q5_1, Q5_K;
* as `q8_0` if they are a scale times a small integer: Q8_0 (its own twin), Q5_0, IQ4_NL, Q6_K, Q3_K, IQ4_XS.

What is left (IQ1 to IQ3, TQ, MXFP4) is quantized a second time, to q8_0.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_qft.quant.affine4 import Affine4, affine4_from_q4_1
from dist_qft.quant.affine8 import Affine8
from dist_qft.quant.contract import Format
from dist_qft.quant.nibbles import pack_nibbles
from dist_qft.quant.q8_0 import Q8_0, q8_0_from_gguf

FLOATS = ("F32", "F16", "BF16", "F64")
NEAREST = Q8_0()  # for types that no format holds value for value
_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class GgufType:
    """The format that holds a GGUF type, and the conversion of its raw rows into packed tensors."""

    format: Format
    packed: Callable[[Tensor], dict[str, Tensor]]


def _from_q4_0(raw: Tensor) -> dict[str, Tensor]:
    blocks = raw.unflatten(1, (-1, 2 + 16))
    scale = _half(blocks[:, :, :2])
    return {"codes": blocks[:, :, 2:].flatten(1), "scale": scale, "zero": scale * -8}


def _from_q5_0(raw: Tensor) -> dict[str, Tensor]:
    blocks = raw.unflatten(1, (-1, 2 + 4 + 16))
    return {"codes": _signed(_five_bits(blocks[:, :, 2:]), 16), "scale": _half(blocks[:, :, :2])}


def _from_q5_1(raw: Tensor) -> dict[str, Tensor]:
    blocks = raw.unflatten(1, (-1, 2 + 2 + 4 + 16))
    return {
        "codes": _five_bits(blocks[:, :, 4:]).flatten(1),
        "scale": _half(blocks[:, :, 0:2]),
        "zero": _half(blocks[:, :, 2:4]),
    }


def _from_q5_k(raw: Tensor) -> dict[str, Tensor]:
    blocks = raw.unflatten(1, (-1, 2 + 2 + 12 + 32 + 128))
    scale, minimum = _six_bit_pairs(blocks[:, :, 4:16])
    # Bit i of 32 bytes belongs to the i-th 32 weights, whose low bits are the low or high nibbles of 32 other bytes.
    high = _shifted(blocks[:, :, 16:48].unsqueeze(2), tuple(range(8))) & 1
    quads = blocks[:, :, 48:].unflatten(2, (4, 1, 32))
    low = torch.cat([quads & 0x0F, quads >> 4], dim=3).flatten(2).unflatten(2, (8, 32))
    return {
        "codes": (low | high << 4).flatten(1),
        "scale": (_half(blocks[:, :, 0:2]).float().unsqueeze(-1) * scale).flatten(1),
        "zero": (_half(blocks[:, :, 2:4]).float().unsqueeze(-1) * minimum).flatten(1).neg(),
    }


def _from_iq4_nl(raw: Tensor) -> dict[str, Tensor]:
    blocks = raw.unflatten(1, (-1, 2 + 16))
    return {"codes": _iq4(_nibbles(blocks[:, :, 2:])), "scale": _half(blocks[:, :, :2])}


def _from_q4_k(raw: Tensor) -> dict[str, Tensor]:
    blocks = raw.unflatten(1, (-1, 2 + 2 + 12 + 128))
    scale, minimum = _six_bit_pairs(blocks[:, :, 4:16])
    # 32 bytes hold 64 weights: the low nibbles the first 32, the high nibbles the next.
    quads = blocks[:, :, 16:].unflatten(2, (4, 1, 32))
    codes = torch.cat([quads & 0x0F, quads >> 4], dim=3)
    return {
        "codes": pack_nibbles(codes.flatten(1)),
        "scale": (_half(blocks[:, :, 0:2]).float().unsqueeze(-1) * scale).flatten(1),
        "zero": (_half(blocks[:, :, 2:4]).float().unsqueeze(-1) * minimum).flatten(1).neg(),
    }


def _from_q2_k(raw: Tensor) -> dict[str, Tensor]:
    blocks = raw.unflatten(1, (-1, 16 + 64 + 2 + 2))
    pairs = blocks[:, :, :16]
    codes = _shifted(blocks[:, :, 16:80].unflatten(2, (2, 1, 32)), (0, 2, 4, 6)) & 3
    return {
        "codes": pack_nibbles(codes.flatten(1)),
        "scale": (_half(blocks[:, :, 80:82]).float().unsqueeze(-1) * (pairs & 0x0F)).flatten(1),
        "zero": (_half(blocks[:, :, 82:84]).float().unsqueeze(-1) * (pairs >> 4)).flatten(1).neg(),
    }


def _from_q6_k(raw: Tensor) -> dict[str, Tensor]:
    blocks = raw.unflatten(1, (-1, 128 + 64 + 16 + 2))
    low = _shifted(blocks[:, :, :128].unflatten(2, (2, 1, 64)), (0, 4)) & 0x0F
    high = _shifted(blocks[:, :, 128:192].unflatten(2, (2, 1, 32)), (0, 2, 4, 6)) & 3
    codes = low.flatten(2) | high.flatten(2) << 4
    scale = blocks[:, :, 192:208].contiguous().view(torch.int8).float()
    return {"codes": _signed(codes, 32), "scale": (_half(blocks[:, :, 208:]).float().unsqueeze(-1) * scale).flatten(1)}


def _from_q3_k(raw: Tensor) -> dict[str, Tensor]:
    blocks = raw.unflatten(1, (-1, 32 + 64 + 12 + 2))
    missing = (_shifted(blocks[:, :, :32].unflatten(2, (1, 1, 32)), tuple(range(8))) & 1) ^ 1  # the bit says: no offset
    low = _shifted(blocks[:, :, 32:96].unflatten(2, (2, 1, 32)), (0, 2, 4, 6)) & 3
    codes = low.flatten(2).to(torch.int8) - (missing.flatten(2) << 2).to(torch.int8)
    scale_low = _shifted(blocks[:, :, 96:104].unsqueeze(2), (0, 4)).flatten(2) & 0x0F
    scale_high = _shifted(blocks[:, :, 104:108].unsqueeze(2), (0, 2, 4, 6)).flatten(2) & 3
    scale = (scale_low | scale_high << 4).float() - 32
    return {
        "codes": codes.flatten(1),
        "scale": (_half(blocks[:, :, 108:]).float().unsqueeze(-1) * scale).flatten(1),
    }


def _from_iq4_xs(raw: Tensor) -> dict[str, Tensor]:
    blocks = raw.unflatten(1, (-1, 2 + 2 + 4 + 128))
    scale_low = (blocks[:, :, 4:8].unsqueeze(-1) >> torch.tensor([0, 4], dtype=torch.uint8)).flatten(2) & 0x0F
    scale_high = (blocks[:, :, 2:4].unsqueeze(-1) >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)).flatten(2) & 3
    scale = (scale_low | scale_high << 4).float() - 32
    return {
        "codes": _iq4(_nibbles(blocks[:, :, 8:].unflatten(2, (8, 16)))),
        "scale": (_half(blocks[:, :, :2]).float().unsqueeze(-1) * scale).flatten(1),
    }


def _half(pairs: Tensor) -> Tensor:
    """float16 (rows, blocks) of bytes (rows, blocks, 2)."""
    return pairs.contiguous().view(torch.float16).squeeze(-1)


def _shifted(values: Tensor, shifts: tuple[int, ...]) -> Tensor:
    """Bytes (..., 1, n) shifted to the right by each of k numbers: (..., k, n)."""
    return values >> torch.tensor(shifts, dtype=torch.uint8).view(-1, 1)


def _nibbles(data: Tensor) -> Tensor:
    """The low nibbles of the last dimension, then the high ones."""
    return torch.cat([data & 0x0F, data >> 4], dim=-1)


def _five_bits(data: Tensor) -> Tensor:
    """Codes 0..31 (..., 32) of 4 bytes with their highest bits and 16 bytes with the rest."""
    high = data[..., :4].unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1
    return _nibbles(data[..., 4:]) | high.flatten(-2) << 4


def _signed(codes: Tensor, offset: int) -> Tensor:
    return (codes.to(torch.int8) - offset).flatten(1)


def _iq4(codes: Tensor) -> Tensor:
    return torch.tensor(_IQ4_VALUES, dtype=torch.int8)[codes.flatten(1).int()]


def _six_bit_pairs(data: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minima of 6 bits each, in 12 bytes."""
    low, middle, high = data.unflatten(2, (3, 4)).unbind(2)
    scale = torch.cat([low & 0x3F, (high & 0x0F) | (low >> 2) & 0x30], dim=-1)
    minimum = torch.cat([middle & 0x3F, (high >> 4) | (middle >> 2) & 0x30], dim=-1)
    return scale, minimum


_AFFINE = Affine4((1, 32))
GGUF_TYPES: dict[str, GgufType] = {
    "Q4_1": GgufType(_AFFINE, affine4_from_q4_1),
    "Q4_0": GgufType(_AFFINE, _from_q4_0),
    "Q4_K": GgufType(Affine4((1, 32), "float32"), _from_q4_k),
    "Q2_K": GgufType(Affine4((1, 16), "float32"), _from_q2_k),
    "Q8_0": GgufType(Q8_0(), q8_0_from_gguf),
    "Q5_0": GgufType(Q8_0(), _from_q5_0),
    "IQ4_NL": GgufType(Q8_0(), _from_iq4_nl),
    "Q5_1": GgufType(Affine8(32, "float16"), _from_q5_1),
    "Q5_K": GgufType(Affine8(32), _from_q5_k),
    "Q6_K": GgufType(Q8_0(16, "float32"), _from_q6_k),
    "Q3_K": GgufType(Q8_0(16, "float32"), _from_q3_k),
    "IQ4_XS": GgufType(Q8_0(32, "float32"), _from_iq4_xs),
}
