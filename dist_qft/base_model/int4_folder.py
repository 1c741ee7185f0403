"""int4 folders of GPTQ, AWQ, AutoRound and compressed-tensors: which weights there are, and in which layout.

AutoRound writes GPTQ's layout or AWQ's and says which (`packing_format`; its first versions said it by `backend`). The
layouts are in `int4_weights`.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch

from dist_qft.base_model.int4_weights import AwqWeight, CompressedWeight, GptqWeight, Int4Weight
from dist_qft.base_model.packed_folder import matrix_shape, require_part
from dist_qft.base_model.sources import SafetensorsSource
from dist_qft.errors import CorruptFileError, UserError

_T = TypeVar("_T")
_SCALES = ("F16", "BF16", "F32")
_GPTQ_ONE_LESS = {"gptq": True, "gptq_v2": False}  # by `checkpoint_format`: zeros are stored one less than they are
# The same by AutoRound's `packing_format`; None is AWQ's layout. Its loader takes one that says nothing for `auto`.
_ROUND_ONE_LESS = {
    "auto": True,
    "auto_round:gptq": True,
    "auto_round:auto_gptq": True,
    "auto_round": False,
    "auto_round:gptqmodel": False,
    "auto_round:awq": None,
    "auto_round:auto_awq": None,
}
_ROUND_KERNELS = (":exllamav2", ":tritonv2", ":gemm")  # ends of an old `backend`, of no concern to the layout
_ROUND_TURNS = ("rotation_config", "spinquant_config")


def gptq_weights(files: SafetensorsSource, settings: Mapping[str, Any]) -> Iterator[Int4Weight]:
    """The weights of a GPTQ folder."""
    key = "format" if "format" in settings and "checkpoint_format" not in settings else "checkpoint_format"
    return _gptq_layout(files, settings, "GPTQ", _known(files, key, settings.get(key, "gptq"), _GPTQ_ONE_LESS))


def auto_round_weights(files: SafetensorsSource, settings: Mapping[str, Any]) -> Iterator[Int4Weight]:
    """The weights of an AutoRound folder."""
    for key in _ROUND_TURNS:
        if settings.get(key):
            raise UserError(
                f"{files.where}: AutoRound with {key} is not supported: inputs are rotated before a product"
            )
    key, packing = "packing_format", settings.get("packing_format")
    if packing is None:
        key, packing = "backend", str(settings.get("backend", "auto"))
        packing = next((packing.removesuffix(kernel) for kernel in _ROUND_KERNELS if packing.endswith(kernel)), packing)
    one_less = _known(files, key, packing, _ROUND_ONE_LESS)
    return awq_weights(files, settings) if one_less is None else _gptq_layout(files, settings, "AutoRound", one_less)


def _known(files: SafetensorsSource, key: str, value: object, known: Mapping[str, _T]) -> _T:
    """The entry of a setting's value in a table of those that are known."""
    if not isinstance(value, str) or value not in known:
        allowed = ", ".join(known)
        raise UserError(f"{files.where}: quantization_config.{key}: got {value!r}, must be one of {allowed}")
    return known[value]


def _gptq_layout(
    files: SafetensorsSource, settings: Mapping[str, Any], label: str, one_less: bool
) -> Iterator[Int4Weight]:
    """The weights of a folder in GPTQ's layout."""
    for module in _modules(files, "qweight"):
        own = _layer_settings(files, settings, module)
        words, out_features = matrix_shape(files, f"{module}.qweight")
        in_features = words * 8
        groups, _ = matrix_shape(files, f"{module}.scales")
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
        own = _layer_settings(files, settings, module)
        in_features, words = matrix_shape(files, f"{module}.qweight")
        groups, out_features = matrix_shape(files, f"{module}.scales")
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
        _, groups = matrix_shape(files, scale)
        group = _group_size(files, columns, columns // groups if columns % groups == 0 else -1)
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


def _layer_settings(files: SafetensorsSource, settings: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """The settings of one layer: AutoRound's `extra_config` and GPTQModel's `dynamic` change those of the folder."""
    own = dict(settings)
    extra = settings.get("extra_config")
    if isinstance(extra, Mapping) and isinstance(extra.get(module), Mapping):
        own |= extra[module]
    dynamic = settings.get("dynamic")
    for pattern, changes in dynamic.items() if isinstance(dynamic, Mapping) else ():
        if isinstance(changes, Mapping) and _matches(files, pattern.removeprefix("+:"), module):
            own |= changes
    return own


def _matches(files: SafetensorsSource, pattern: str, module: str) -> bool:
    try:
        return re.match(pattern, module) is not None
    except re.error as error:
        raise CorruptFileError(f"{files.where}: 'dynamic' has the pattern {pattern!r}: {error}") from error


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
    """True if each scale, and 8 times it, is a float16. Scales of another type are all read for that.

    Of float16 scales it is taken for granted. A scale above 8188 would make an infinite zero, and is refused when read.
    """
    if files.dtype(name) == "F16":
        return True
    scale = files.read(name).float()
    return torch.equal(scale.half().float(), scale) and bool((scale.abs() * 8 <= torch.finfo(torch.float16).max).all())


def _words(label: str, group: int, symmetric: bool, gathered: bool) -> str:
    return f"{label} {'' if symmetric else 'asymmetric '}int4, groups of {group}{', act-order' if gathered else ''}"
