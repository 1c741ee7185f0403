"""The layouts of int4 weights: integer codes, scales, and zeros that are integers too.

Each of these means w = scale * (q - z) with q and z in 0..15, which is `affine4` with zero = -scale * z. Symmetric
weights have z = 8, and -8 * scale is exact in float16; any other z asks for float32 constants. The layouts:

    GPTQ       qweight int32 (in / 8, out), low nibble first along the inputs; qzeros int32 (groups, out / 8), one less
               than z in the first version of the format; scales (groups, out); g_idx int32 (in), each input's group
    AWQ        qweight int32 (in, out / 8) and qzeros (groups, out / 8), outputs in the order 0 2 4 6 1 3 5 7; scales
    compressed weight_packed int32 (out, in / 8), low nibble first; weight_scale (out, groups); weight_zero_point int32
               (out / 8, groups); weight_shape; weight_g_idx. z is 8 more than the signed zero, as q is
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_qft.base_model.packed_folder import StoredWeight
from dist_qft.base_model.sources import SafetensorsSource
from dist_qft.errors import CorruptFileError
from dist_qft.quant.affine4 import Affine4, rounded_scale
from dist_qft.quant.affine4_gathered import Affine4Gathered
from dist_qft.quant.contract import Format
from dist_qft.quant.nibbles import pack_nibbles

_SYMMETRIC_ZERO = 8
_ONE_MORE = 0x11111111  # added to a word of eight zeros that were stored one less
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble of an AWQ word that holds each of eight outputs


@dataclass(frozen=True)
class Int4Weight(StoredWeight):
    """An int4 weight. Subclasses know a layout; scales and zeros come back as (rows, groups).

    Attributes:
        group: inputs that share constants (the last group may be shorter); with `gathered`, the number per group.
        symmetric: no zeros are needed; z is 8.
        gathered: the groups are not neighbouring inputs.
        exact_half: scale and zero are exact in float16.
    """

    group: int
    symmetric: bool
    gathered: bool
    exact_half: bool

    @property
    def groups(self) -> int:
        return -(-self.shape[1] // self.group)

    @property
    def block(self) -> int:
        """Inputs that share constants in `affine4`, whose blocks divide the row."""
        return math.gcd(self.group, self.shape[1])

    @property
    def format(self) -> Format:
        constants = "float16" if self.symmetric and self.exact_half else "float32"
        return Affine4Gathered(self.groups, constants) if self.gathered else Affine4((1, self.block), constants)

    def read_packed(self, files: SafetensorsSource, first: int, stop: int) -> dict[str, Tensor]:
        codes = self._codes(files, first, stop)
        # Rounded first: scale * q and scale * z then cancel where q = z, as they do in the file's own arithmetic.
        scale = rounded_scale(self._scale(files, first, stop).float())
        zero = scale * -float(_SYMMETRIC_ZERO)
        if not self.symmetric:
            zero = -scale * self._zeros(files, first, stop).float()
        constants = {"scale": scale, "zero": zero}
        if self.symmetric and self.exact_half:
            constants = {"scale": scale.half(), "zero": zero.half()}
        packed = {"codes": pack_nibbles(codes)}
        if self.gathered:
            return packed | constants | {"group": self._groups_of_inputs(files)}
        # Blocks are whole groups, or parts of them where a row ends within one.
        block_groups = torch.arange(0, self.shape[1], self.block) // self.group
        return packed | {name: tensor[:, block_groups].contiguous() for name, tensor in constants.items()}

    def _codes(self, files: SafetensorsSource, first: int, stop: int) -> Tensor:
        """uint8 (rows, in)."""
        raise NotImplementedError

    def _scale(self, files: SafetensorsSource, first: int, stop: int) -> Tensor:
        raise NotImplementedError

    def _zeros(self, files: SafetensorsSource, first: int, stop: int) -> Tensor:
        """z as integers."""
        raise NotImplementedError

    def _groups_of_inputs(self, files: SafetensorsSource) -> Tensor:
        """int32 (in,)."""
        raise NotImplementedError


@dataclass(frozen=True)
class GptqWeight(Int4Weight):
    """GPTQ's layout; `one_less` if the zeros are stored one less than they are."""

    one_less: bool

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(f"{self.module}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx"))

    def read_packed(self, files: SafetensorsSource, first: int, stop: int) -> dict[str, Tensor]:
        if self.symmetric and not (self._zeros(files, first, stop) == _SYMMETRIC_ZERO).all():
            raise CorruptFileError(f"{files.where}: {self.module} is said to be symmetric, and its zeros are not all 8")
        return super().read_packed(files, first, stop)

    def _codes(self, files: SafetensorsSource, first: int, stop: int) -> Tensor:
        words = files.read_box(f"{self.module}.qweight", ((0, self.shape[1] // 8), (first, stop)))
        return _nibbles_of_words(words.t())

    def _scale(self, files: SafetensorsSource, first: int, stop: int) -> Tensor:
        return files.read_box(f"{self.module}.scales", ((0, self.groups), (first, stop))).t().contiguous()

    def _zeros(self, files: SafetensorsSource, first: int, stop: int) -> Tensor:
        begin, end = first // 8, -(-stop // 8)
        words = files.read_box(f"{self.module}.qzeros", ((0, self.groups), (begin, end)))
        if self.one_less:
            words = (words.long() + _ONE_MORE).to(torch.int32)  # wraps around, as the subtraction did
        return _nibbles_of_words(words)[:, first - begin * 8 : stop - begin * 8].t()

    def _groups_of_inputs(self, files: SafetensorsSource) -> Tensor:
        return files.read(f"{self.module}.g_idx").to(torch.int32)


@dataclass(frozen=True)
class AwqWeight(Int4Weight):
    """AWQ's `gemm` layout."""

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(f"{self.module}.{part}" for part in ("qweight", "qzeros", "scales"))

    def _codes(self, files: SafetensorsSource, first: int, stop: int) -> Tensor:
        return self._outputs(files, "qweight", self.shape[1], first, stop)

    def _scale(self, files: SafetensorsSource, first: int, stop: int) -> Tensor:
        return files.read_box(f"{self.module}.scales", ((0, self.groups), (first, stop))).t().contiguous()

    def _zeros(self, files: SafetensorsSource, first: int, stop: int) -> Tensor:
        return self._outputs(files, "qzeros", self.groups, first, stop)

    def _outputs(self, files: SafetensorsSource, part: str, height: int, first: int, stop: int) -> Tensor:
        """The numbers of some outputs (outputs, height), from words that hold eight outputs each."""
        begin, end = first // 8, -(-stop // 8)
        words = files.read_box(f"{self.module}.{part}", ((0, height), (begin, end)))
        in_order = _nibbles_of_words(words).unflatten(1, (-1, 8))[:, :, list(_AWQ_ORDER)].flatten(1)
        return in_order[:, first - begin * 8 : stop - begin * 8].t().contiguous()


@dataclass(frozen=True)
class CompressedWeight(Int4Weight):
    """The `pack-quantized` layout of compressed-tensors."""

    @property
    def parts(self) -> tuple[str, ...]:
        suffixes = ("packed", "scale", "zero_point", "shape", "g_idx")
        return tuple(f"{self.module}.weight_{suffix}" for suffix in suffixes)

    def _codes(self, files: SafetensorsSource, first: int, stop: int) -> Tensor:
        words = files.read(f"{self.module}.weight_packed", (first, stop))
        return _nibbles_of_words(words)[:, : self.shape[1]].contiguous()

    def _scale(self, files: SafetensorsSource, first: int, stop: int) -> Tensor:
        return files.read(f"{self.module}.weight_scale", (first, stop))

    def _zeros(self, files: SafetensorsSource, first: int, stop: int) -> Tensor:
        begin, end = first // 8, -(-stop // 8)
        words = files.read_box(f"{self.module}.weight_zero_point", ((begin, end), (0, self.groups)))
        return _nibbles_of_words(words.t())[:, first - begin * 8 : stop - begin * 8].t()

    def _groups_of_inputs(self, files: SafetensorsSource) -> Tensor:
        return files.read(f"{self.module}.weight_g_idx").to(torch.int32)


def _nibbles_of_words(words: Tensor) -> Tensor:
    """uint8 (n, 8 m) of int32 (n, m), low nibbles first."""
    # A copy, because a single column may count as contiguous whatever its stride, and is no run of bytes then.
    data = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return torch.stack([data & 0x0F, data >> 4], dim=-1).flatten(1)
