"""The plan of a merge, made before any weight is read: the request, and each layer's format in the result."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from dist_qft.base_model.skeleton import BaseModel
from dist_qft.config.schema import MergeTarget, QuantizationConfig, RunConfig
from dist_qft.errors import UserError
from dist_qft.methods.adapters.exact_fold import folding_obstacle
from dist_qft.methods.adapters.schedule import TileSettings
from dist_qft.quant.contract import Format
from dist_qft.quant.formats import linear_format

Kind = Literal["exact", "rounded", "dense", "requantized", "lora"]
Requantize = Literal["nf4", "affine4"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class MergeRequest:
    """The user's request. `path` is the file or folder to write, `dtype` that of a dense result."""

    target: MergeTarget
    path: Path
    overwrite: bool = False
    requantize: Requantize | None = None
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Recipe:
    """The plan that carries out a request.

    Attributes:
        kind: `exact` folds dW into zeros, `rounded` then also rounds all constants of a layer and keeps its codes,
            `dense` adds dW to dequantized weights, `requantized` quantizes these again, `lora` leaves the base alone
            and writes the adapters.
        tiles: the adapters' settings by layer path.
        formats: for `rounded` and `requantized`, the new format of each linear layer that gets one.
        quantization: the config section that describes the result's linear layers and tables.
    """

    request: MergeRequest
    kind: Kind
    tiles: Mapping[str, TileSettings]
    formats: Mapping[str, Format]
    quantization: QuantizationConfig

    @property
    def dtype(self) -> torch.dtype | None:
        """Dtype of a dense result's weights; None for any other kind."""
        return DTYPES[self.request.dtype] if self.kind == "dense" else None

    @property
    def adapted_weights(self) -> int:
        """Number of weights of the layers that have adapters."""
        return sum(tile.in_features * tile.out_features * (tile.experts or 1) for tile in self.tiles.values())

    def folds(self, path: str) -> bool:
        """True if dW of this layer goes exactly into its packed tensors."""
        return self.kind in ("exact", "rounded", "requantized") and path in self.tiles and path not in self.formats


def quantized_recipe(
    request: MergeRequest, config: RunConfig, base: BaseModel, tiles: Mapping[str, TileSettings]
) -> Recipe:
    """The exact merge into the base's own formats, or with `--requantize` the inexact one.

    Raises:
        UserError: dW does not fold exactly, or the new format cannot hold a layer.
    """
    if request.requantize is None:
        if obstacle := folding_obstacle(tiles, base.matrices):
            raise UserError(
                f"no exact merge: {obstacle}; "
                "--requantize affine4 or --to dense merge with an error, which their certificate states"
            )
        return Recipe(request, "exact", tiles, {}, config.quantization)
    quantization = config.quantization
    if quantization.linear != request.requantize:  # otherwise the same blocks as the base
        changes = {"linear": request.requantize, "block": None, "double_quant": False, "constants": None}
        quantization = quantization.model_copy(update=changes)
    new = linear_format(quantization.linear, quantization.block, quantization.double_quant, quantization.constants)
    formats = {}
    for path, layer in base.matrices.items():
        if layer.format.name != "dense" and (layer.format != new or path in tiles):
            new.check((layer.out_features, layer.in_features), path)
            formats[path] = new
    return Recipe(request, "requantized", tiles, formats, quantization)
