"""int4 weights of GPTQ, AWQ, AutoRound and compressed-tensors: integer codes, scales, and zeros that are integers too.

Each of these means w = scale * (q - z) with q and z in 0..15, which is `affine4` with zero = -scale * z. Symmetric
weights have z = 8, and -8 * scale is exact in float16; any other z asks for float32 constants. The layouts:

    GPTQ       qweight int32 (in / 8, out), low nibble first along the inputs; qzeros int32 (groups, out / 8), one less
               than z in the first version of the format; scales (groups, out); g_idx int32 (in), each input's group
    AWQ        qweight int32 (in, out / 8) and qzeros (groups, out / 8), outputs in the order 0 2 4 6 1 3 5 7; scales
    compressed weight_packed int32 (out, in / 8), low nibble first; weight_scale (out, groups); weight_zero_point int32
               (out / 8, groups); weight_shape; weight_g_idx. z is 8 more than the signed zero, as q is

AutoRound writes one of these and says which (`packing_format`).
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_qft.base_model.packed_folder import StoredWeight, require_part
from dist_qft.base_model.sources import SafetensorsSource
from dist_qft.errors import CorruptFileError, UserError
from dist_qft.quant.affine4 import Affine4, rounded_scale
from dist_qft.quant.affine4_gathered import Affine4Gathered
from dist_qft.quant.contract import Format
from dist_qft.quant.nibbles import pack_nibbles

_SCALES = ("F16", "BF16", "F32")
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
        codes, scale = self._codes(files, first, stop), self._scale(files, first, stop).float()
        zero = scale * -float(_SYMMETRIC_ZERO)
        if not self.symmetric:
            zero = -scale * self._zeros(files, first, stop).float()
        constants = {"scale": rounded_scale(scale), "zero": zero}
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


def gptq_weights(files: SafetensorsSource, settings: Mapping[str, Any]) -> Iterator[Int4Weight]:
    """The weights of a GPTQ or AutoRound folder in GPTQ's layout."""
    method = settings.get("quant_method")
    packing = str(settings.get("packing_format", ""))
    one_less = settings.get("checkpoint_format", "gptq") == "gptq" if method == "gptq" else "gptq" in packing
    label = "GPTQ" if method == "gptq" else "AutoRound"
    for module in _modules(files, "qweight"):
        own = _layer_settings(settings, module)
        out_features = files.shape(f"{module}.qweight")[-1]
        in_features = files.shape(f"{module}.qweight")[0] * 8
        groups = files.shape(f"{module}.scales")[0] if f"{module}.scales" in files.names() else 0
        group = _group_size(files, in_features, own.get("group_size", -1))
        _require_four_bits(files, module, own, groups, in_features, group)
        gathered = _gathered(files, f"{module}.g_idx", in_features, group, groups)
        require_part(files, f"{module}.qweight", (in_features // 8, out_features), ("I32",))
        require_part(files, f"{module}.qzeros", (groups, -(-out_features // 8)), ("I32",))
        require_part(files, f"{module}.scales", (groups, out_features), _SCALES)
        symmetric = own.get("sym") is True
        yield GptqWeight(
            module,
            (out_features, in_features),
            _words(label, group, symmetric, gathered),
            group,
            symmetric,
            gathered,
            exact_half=_exact_in_half(files, f"{module}.scales"),
            one_less=one_less,
        )


def awq_weights(files: SafetensorsSource, settings: Mapping[str, Any]) -> Iterator[Int4Weight]:
    """The weights of an AWQ folder, or of an AutoRound folder in AWQ's layout."""
    version = str(settings.get("version", "gemm")).lower()
    if version != "gemm":
        raise UserError(f"{files.where}: AWQ version '{version}' is not supported, only gemm")
    for module in _modules(files, "qweight"):
        own = _layer_settings(settings, module)
        in_features, words = files.shape(f"{module}.qweight")
        groups, out_features = files.shape(f"{module}.scales") if f"{module}.scales" in files.names() else (0, 0)
        group = _group_size(files, in_features, own.get("group_size", own.get("q_group_size", -1)))
        _require_four_bits(files, module, own, groups, in_features, group)
        require_part(files, f"{module}.qweight", (in_features, -(-out_features // 8)), ("I32",))
        require_part(files, f"{module}.qzeros", (groups, words), ("I32",))
        require_part(files, f"{module}.scales", (groups, out_features), _SCALES)
        shape = (out_features, in_features)
        yield AwqWeight(module, shape, _words("AWQ", group, False, False), group, False, False, exact_half=False)


def compressed_int4_weights(files: SafetensorsSource) -> Iterator[Int4Weight]:
    """The int4 weights of a compressed-tensors folder."""
    for module in _modules(files, "weight_packed"):
        if files.dtype(f"{module}.weight_packed") != "I32":
            continue
        rows, columns = _stored_shape(files, f"{module}.weight_shape")
        if files.shape(f"{module}.weight_packed") != (rows, -(-columns // 8)):
            raise UserError(f"{files.where}: {module} is not packed in 4 bits; only 4-bit integers are supported")
        scale = f"{module}.weight_scale"
        groups = files.shape(scale)[-1] if scale in files.names() else 0
        group = _group_size(files, columns, columns // groups if groups and columns % groups == 0 else -1)
        _require_four_bits(files, module, {}, groups, columns, group)
        require_part(files, scale, (rows, groups), _SCALES)
        gathered = _gathered(files, f"{module}.weight_g_idx", columns, group, groups)
        symmetric = f"{module}.weight_zero_point" not in files.names()
        if not symmetric:
            require_part(files, f"{module}.weight_zero_point", (-(-rows // 8), groups), ("I32",))
        words = _words("compressed-tensors", group, symmetric, gathered)
        half = symmetric and _exact_in_half(files, scale)
        yield CompressedWeight(module, (rows, columns), words, group, symmetric, gathered, exact_half=half)


def _modules(files: SafetensorsSource, part: str) -> list[str]:
    return sorted(name.removesuffix(f".{part}") for name in files.names() if name.endswith(f".{part}"))


def _layer_settings(settings: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """The settings of one layer: AutoRound's `extra_config` and GPTQModel's `dynamic` change those of the folder."""
    own = dict(settings)
    extra = settings.get("extra_config")
    if isinstance(extra, Mapping) and isinstance(extra.get(module), Mapping):
        own |= extra[module]
    dynamic = settings.get("dynamic")
    for pattern, changes in dynamic.items() if isinstance(dynamic, Mapping) else ():
        if isinstance(changes, Mapping) and re.match(pattern.removeprefix("+:"), module):
            own |= changes
    return own


def _group_size(files: SafetensorsSource, in_features: int, group: object) -> int:
    """Inputs per group; -1 stands for all of them."""
    size = in_features if group in (-1, None, 0) else group
    if not isinstance(size, int) or size < 1:
        raise CorruptFileError(f"{files.where}: group_size: got {group!r}, must be a number of inputs or -1")
    return size


def _gathered(files: SafetensorsSource, g_idx: str, in_features: int, group: int, groups: int) -> bool:
    """True if the groups are not neighbouring inputs."""
    if g_idx not in files.names():
        return False
    require_part(files, g_idx, (in_features,), ("I32", "I64"))
    found = files.read(g_idx).long()
    if int(found.min()) < 0 or int(found.max()) >= groups:
        raise CorruptFileError(f"{files.where}: tensor '{g_idx}' names group {int(found.max())} of {groups}")
    return not torch.equal(found, torch.arange(in_features) // group)


def _require_four_bits(
    files: SafetensorsSource, module: str, settings: Mapping[str, Any], groups: int, in_features: int, group: int
) -> None:
    bits = settings.get("bits", settings.get("w_bit", 4))
    if bits != 4:
        raise UserError(f"{files.where}: {module} is quantized to {bits} bits; only 4-bit integers are supported")
    if groups != -(-in_features // group):
        raise CorruptFileError(
            f"{files.where}: {module} has {groups} groups of scales, must be {-(-in_features // group)} "
            f"for {in_features} inputs in groups of {group}"
        )


def _stored_shape(files: SafetensorsSource, name: str) -> tuple[int, int]:
    require_part(files, name, (2,), ("I64", "I32"))
    rows, columns = files.read(name).tolist()
    if min(rows, columns) < 1 or max(rows, columns) > 1 << 32:
        raise CorruptFileError(f"{files.where}: tensor '{name}' says {rows} x {columns}")
    return rows, columns


def _exact_in_half(files: SafetensorsSource, name: str) -> bool:
    """True if each scale, and 8 times it, is a float16. Scales of another type are all read for that."""
    scale = files.read(name).float()
    return torch.equal(scale.half().float(), scale) and bool((scale.abs() * 8 <= torch.finfo(torch.float16).max).all())


def _nibbles_of_words(words: Tensor) -> Tensor:
    """uint8 (n, 8 m) of int32 (n, m), low nibbles first."""
    # A copy, because a single column may count as contiguous whatever its stride, and is no run of bytes then.
    data = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return torch.stack([data & 0x0F, data >> 4], dim=-1).flatten(1)


def _words(label: str, group: int, symmetric: bool, gathered: bool) -> str:
    return f"{label} {'' if symmetric else 'asymmetric '}int4, groups of {group}{', act-order' if gathered else ''}"
