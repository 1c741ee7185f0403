"""FP4 weights of other programs, byte for byte as `codebook4`.

compressed-tensors     <module>.weight_packed uint8 (out, in / 2), low nibble first; weight_scale: E4M3 for NVFP4,
                       with weight_global_scale, by which the block's scale is divided; uint8 (E8M0) for MXFP4
ModelOpt               <module>.weight uint8 (out, in / 2); weight_scale E4M3; weight_scale_2, which multiplies
gpt-oss                MXFP4: <stack>_blocks uint8 (experts, out, in / 32, 16), low nibble first, and <stack>_scales
                       uint8 (experts, out, in / 32). The library's parameter <stack> is (experts, in, out)
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_qft.base_model.packed_folder import StoredWeight, matrix_shape, require_part
from dist_qft.base_model.sources import SafetensorsSource, require_finite
from dist_qft.errors import CorruptFileError
from dist_qft.quant.codebook4 import Codebook4

_IGNORED = ("input_scale", "input_global_scale", "weight_zero_point")


@dataclass(frozen=True)
class Fp4Weight(StoredWeight):
    """An FP4 weight: the names of its codes, its block scales, and the scale of the whole tensor if it has one."""

    codes: str
    scale: str
    tensor_scale: str | None
    codebook: Codebook4

    @property
    def parts(self) -> tuple[str, ...]:
        own = (self.codes, self.scale, *((self.tensor_scale,) if self.tensor_scale else ()))
        return (*own, *(f"{self.module}.{name}" for name in _IGNORED))

    @property
    def format(self) -> Codebook4:
        return self.codebook

    def read_packed(self, files: SafetensorsSource, first: int, stop: int) -> dict[str, Tensor]:
        columns = self.shape[-1]
        packed = {
            "codes": files.read_rows(self.codes, columns // 2, first, stop),
            "scale": files.read_rows(self.scale, columns // self.codebook.block, first, stop),
        }
        packed["scale"] = packed["scale"].view(torch.uint8)  # also E4M3's: not every collective takes that type
        if self.tensor_scale is not None:
            packed["global"] = files.read(self.tensor_scale).float().reshape(1)
        require_finite(files, self.scale, self.codebook.scales(packed))
        return packed


def compressed_fp4_weights(files: SafetensorsSource) -> Iterator[Fp4Weight]:
    """The NVFP4 and MXFP4 weights of a compressed-tensors folder."""
    names = files.names()
    for codes in sorted(name for name in names if name.endswith(".weight_packed") and files.dtype(name) == "U8"):
        module = codes.removesuffix(".weight_packed")
        tensor_scale = f"{module}.weight_global_scale"
        kind = "nvfp4-divided" if tensor_scale in names else "mxfp4"
        yield _weight(files, module, codes, tensor_scale if tensor_scale in names else None, kind)


def modelopt_fp4_weights(files: SafetensorsSource) -> Iterator[Fp4Weight]:
    """The NVFP4 weights of a ModelOpt folder."""
    for tensor_scale in sorted(name for name in files.names() if name.endswith(".weight_scale_2")):
        module = tensor_scale.removesuffix(".weight_scale_2")
        yield _weight(files, module, f"{module}.weight", tensor_scale, "nvfp4")


def stacked_mxfp4_weights(files: SafetensorsSource, settings: Mapping[str, Any]) -> Iterator[Fp4Weight]:
    """The stacks of experts of a folder in gpt-oss's layout; its other weights are floats."""
    codebook = Codebook4("mxfp4")
    for codes in sorted(name for name in files.names() if name.endswith("_blocks")):
        stack = codes.removesuffix("_blocks")
        shape = files.shape(codes)
        if len(shape) != 4 or min(shape) < 1:
            raise CorruptFileError(
                f"{files.where}: tensor '{codes}' has the shape {list(shape)}, must be experts, rows, blocks, bytes"
            )
        *rows, blocks, _ = shape
        require_part(files, codes, (*rows, blocks, codebook.block // 2), ("U8",))
        require_part(files, f"{stack}_scales", (*rows, blocks), ("U8", "F8_E8M0"))
        whole = (*rows, blocks * codebook.block)
        yield Fp4Weight(stack, whole, "MXFP4 (stacked experts)", codes, f"{stack}_scales", None, codebook)


def _weight(files: SafetensorsSource, module: str, codes: str, tensor_scale: str | None, kind: str) -> Fp4Weight:
    codebook = Codebook4(kind)
    rows, half = matrix_shape(files, codes)
    require_part(files, codes, (rows, half), ("U8",))
    scale = f"{module}.weight_scale"
    require_part(files, scale, (rows, 2 * half // codebook.block), ("F8_E4M3",) if tensor_scale else ("U8", "F8_E8M0"))
    if tensor_scale is not None:
        require_part(files, tensor_scale, (1,) if files.shape(tensor_scale) else (), ("F32",))
    words = f"{'NVFP4' if tensor_scale else 'MXFP4'} ({kind})"
    return Fp4Weight(module, (rows, 2 * half), words, codes, scale, tensor_scale, codebook)
