"""FP8 weights (E4M3, and E5M2): read as floats, their scales applied while rows are read.

A weight is stored as 8-bit floats beside a scale: one for the tensor, one for each output, or one for each block, of
128 x 128 weights (DeepSeek), of 1 x 32 (MXFP8, whose scales are exponents) or of a size that the settings state. The
true weight is the product. What the settings say about activations does not concern weights. It is then quantized as
any float weight is: a second quantization, which the run's notes report as one. The names differ:

    fp8 (Hugging Face, DeepSeek)     <module>.weight, <module>.weight_scale_inv
    compressed-tensors, ModelOpt     <module>.weight, <module>.weight_scale
    stacked experts                  as those, or <stack>, <stack>_scale_inv

A stack (experts, out_features, in_features) has the scales of its matrices one behind the other.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_qft.base_model.packed_folder import StoredWeight
from dist_qft.base_model.sources import SafetensorsSource
from dist_qft.errors import CorruptFileError
from dist_qft.quant.codebook4 import powers_of_two

_TYPES = ("F8_E4M3", "F8_E5M2")
_EXPONENTS = ("U8", "F8_E8M0")  # types of scales that are powers of two: the byte e stands for 2^(e-127)
_SCALES = ("F32", "F16", "BF16", *_EXPONENTS)
_MX_BLOCK = (1, 32)  # of MXFP8, whether or not it is stated
_SUFFIXES = ("weight_scale_inv", "weight_scale")
_OTHERS = ("input_scale", "weight_zero_point", "activation_scale", "input_scale_inv")


@dataclass(frozen=True)
class Fp8Weight(StoredWeight):
    """An FP8 weight, or stack of them, and its scale's name and grid.

    The scale of row i, column j of a matrix is at [i // rows, j // columns].
    """

    tensor: str
    scale: str
    block: tuple[int, int]

    @property
    def name(self) -> str:
        return self.tensor

    @property
    def parts(self) -> tuple[str, ...]:
        joint = "." if self.tensor.endswith(".weight") else "_"
        return (self.scale, *(f"{self.module}{joint}{other}" for other in _OTHERS))

    def read_floats(self, files: SafetensorsSource, first: int, stop: int) -> Tensor:
        weight = files.read(self.tensor, (first, stop)).float()
        stacked = len(self.shape) == 3
        scale = files.read(self.scale, (first, stop) if stacked else None)
        exponents = files.dtype(self.scale) in _EXPONENTS
        scale = powers_of_two(scale.view(torch.uint8)) if exponents else scale.float()
        rows, columns = self.block
        if stacked:
            _, height, width = self.shape
            grid = scale.reshape(stop - first, -(-height // rows), -(-width // columns))
            by_row = grid[:, torch.arange(height) // rows]
            return weight.mul_(by_row[:, :, torch.arange(width) // columns])
        scale = scale.reshape(-(-self.shape[0] // rows), -(-self.shape[1] // columns))
        by_row = scale[torch.arange(first, stop) // rows]
        if columns == self.shape[1]:
            return weight.mul_(by_row)
        return weight.mul_(by_row[:, torch.arange(self.shape[1]) // columns])


def fp8_weights(files: SafetensorsSource, settings: Mapping[str, Any]) -> Iterator[Fp8Weight]:
    """The FP8 weights of a folder.

    Raises:
        CorruptFileError: a weight without a scale, or with one of another type than is known, or that fits neither
            tensor, rows nor blocks.
    """
    names, blocks = files.names(), _stated_blocks(settings)
    for name in sorted(names):
        module, shape = name.removesuffix(".weight"), files.shape(name)
        beside = [f"{module}.{suffix}" for suffix in _SUFFIXES] if module != name else [f"{name}_scale_inv"]
        scale = next((each for each in beside if each in names), None)
        if files.dtype(name) not in _TYPES or len(shape) not in (2, 3) or (module == name and scale is None):
            continue
        if scale is None:
            raise CorruptFileError(f"{files.where}: '{name}' is {files.dtype(name)} and has no scale beside it")
        if files.dtype(scale) not in _SCALES:
            known = ", ".join(_SCALES)
            raise CorruptFileError(f"{files.where}: scale '{scale}' is {files.dtype(scale)}, must be one of {known}")
        rows, columns = shape[-2:]
        block = _block(files, scale, shape, blocks)
        words = {(rows, columns): "one scale", (1, columns): "a scale per output"}
        how = words.get(block, f"blocks of {block[0]} x {block[1]}")
        yield Fp8Weight(module, shape, f"FP8 {files.dtype(name).removeprefix('F8_')}, {how}", name, scale, block)


def _stated_blocks(settings: Mapping[str, Any]) -> list[tuple[int, int]]:
    """The sizes of blocks, rows by columns, that a `quantization_config` states; 128 x 128 if it states none."""
    groups = settings.get("config_groups")
    weights = [group.get("weights") for group in groups.values() if isinstance(group, Mapping)] if groups else []
    stated = [settings.get("weight_block_size")]
    for each in weights:
        if isinstance(each, Mapping):
            stated += [each.get("block_structure"), [1, each.get("group_size")]]
    found = []
    for sizes in stated:
        parts = sizes.lower().split("x") if isinstance(sizes, str) else sizes  # older folders have "128x128"
        if isinstance(parts, list | tuple) and len(parts) == 2 and all(str(part).isdecimal() for part in parts):
            found.append((int(parts[0]), int(parts[1])))
    return [block for block in dict.fromkeys(found) if min(block) > 0] or [(128, 128)]


def _block(
    files: SafetensorsSource, scale: str, shape: tuple[int, ...], stated: list[tuple[int, int]]
) -> tuple[int, int]:
    *experts, rows, columns = shape
    found = files.shape(scale)
    if experts and found[:1] != tuple(experts):
        raise CorruptFileError(f"{files.where}: scale '{scale}' is {list(found)}, must have {experts[0]} entries")
    found = found[len(experts) :]
    if len(found) == 4 and found[1] == found[3] == 1:  # ModelOpt's blocks, one dimension for each side of a block
        found = (found[0], found[2])
    if files.dtype(scale) in _EXPONENTS:
        stated = list(dict.fromkeys([*stated, _MX_BLOCK]))
    if math.prod(found) == 1 and len(found) < 3:
        return rows, columns
    if found in ((rows,), (rows, 1)):
        return (1, columns)
    fitting = [block for block in stated if found == (-(-rows // block[0]), -(-columns // block[1]))]
    if len(fitting) == 1:
        return fitting[0]
    blocks = " and ".join(f"{block[0]} x {block[1]}" for block in fitting or stated)
    fault = f"fits neither a {rows} x {columns} weight, its rows, nor blocks of {blocks}"
    if fitting:
        fault = f"fits blocks of more than one size: {blocks}"
    raise CorruptFileError(f"{files.where}: scale '{scale}' is {list(found)}, which {fault}")
