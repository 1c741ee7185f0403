"""What a merge will do, decided before any weight is read: the request, and each layer's format in the result."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from dist_qft.base_model.skeleton import BaseModel
from dist_qft.config.schema import MergeTarget, QuantizationConfig, RunConfig
from dist_qft.errors import UserError
from dist_qft.methods.adapters.exact_fold import folding_obstacle
from dist_qft.methods.adapters.schedule import TileSettings
from dist_qft.quant.affine4 import Affine4
from dist_qft.quant.contract import Format
from dist_qft.quant.formats import linear_format

Kind = Literal["exact", "dense", "requantized", "lora"]

# Their zeros are integers: zero + dW would be rounded to a whole step of the codes.
INTEGER_ZEROS = ("gptq", "awq", "compressed-tensors")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GGUF_FORMAT = Affine4((1, 32))


@dataclass(frozen=True)
class MergeRequest:
    """What was asked for. `path` is the file or folder to write, `dtype` that of a dense result."""

    target: MergeTarget
    path: Path
    overwrite: bool = False
    requantize: Literal["nf4", "affine4"] | None = None
    dtype: str = "bfloat16"

    @classmethod
    def checked(cls, target: str, path: Path, *, overwrite: bool, requantize: str | None, dtype: str) -> "MergeRequest":
        """The request of a command line; raises UserError for what no model could be merged into."""
        targets = get_args(MergeTarget)
        if target in INTEGER_ZEROS:
            raise UserError(
                f"--to {target}: its zeros are integers and cannot hold zero + dW; "
                "gguf and quantized keep float zeros, dense can be quantized by that format's own tools"
            )
        if target not in targets:
            raise UserError(f"--to: got '{target}', need one of {', '.join(targets)}")
        if requantize is not None and requantize not in ("nf4", "affine4"):
            raise UserError(f"--requantize: got '{requantize}', need nf4 or affine4")
        if requantize is not None and target not in ("gguf", "quantized"):
            raise UserError(f"--requantize: no effect with --to {target}, whose result is not quantized")
        if dtype not in DTYPES:
            raise UserError(f"--dtype: got '{dtype}', need one of {', '.join(DTYPES)}")
        return cls(target, path, overwrite, requantize, dtype)


@dataclass(frozen=True)
class Recipe:
    """How a request is carried out.

    Attributes:
        kind: `exact` folds dW into zeros, `dense` adds it to dequantized weights, `requantized` quantizes these
            again, `lora` leaves the base alone.
        tiles: the adapters' settings by layer path.
        formats: for `requantized`, the new format of each linear layer that gets one.
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

    def folds(self, path: str) -> bool:
        """Whether dW of this layer goes exactly into its packed tensors."""
        return self.kind in ("exact", "requantized") and path in self.tiles and path not in self.formats


def require_free(request: MergeRequest) -> None:
    """Refuse to write where something is already, unless it was asked to be replaced."""
    if request.path.exists() and not request.overwrite:
        raise UserError(
            f"'{request.path}' exists already; --overwrite (merge.overwrite) replaces it, "
            "-o (merge.path) chooses another place"
        )


def make_recipe(request: MergeRequest, config: RunConfig, base: BaseModel, tiles: Mapping[str, TileSettings]) -> Recipe:
    """Decide how to merge adapters of these tiles into this base.

    Raises:
        UserError: dW does not fold exactly, or the target cannot hold the model.
    """
    if (request.path.suffix == ".gguf") != (request.target == "gguf"):
        kind = "a file whose name ends in .gguf" if request.target == "gguf" else "a folder"
        raise UserError(f"'{request.path}': {request.target} is written to {kind}")
    if request.target == "dense":
        quantization = QuantizationConfig(linear="dense", embedding="dense")
        return Recipe(request, "dense", tiles, {}, quantization)
    if request.target == "peft":
        for path, settings in tiles.items():
            require_low_rank(path, settings)
        return Recipe(request, "lora", tiles, {}, config.quantization)
    if request.target == "gguf" and not config.model.path.endswith(".gguf"):
        raise UserError(
            f"--to gguf: the base '{config.model.path}' is not a GGUF file, and its metadata and tokenizer would be "
            "missing; merge --to dense and convert that with llama.cpp's convert_hf_to_gguf.py, or train on a GGUF file"
        )
    recipe = _quantized_recipe(request, config, base, tiles)
    if request.target == "gguf":
        _require_q4_1(recipe, base, tiles)
    return recipe


def _quantized_recipe(
    request: MergeRequest, config: RunConfig, base: BaseModel, tiles: Mapping[str, TileSettings]
) -> Recipe:
    if request.requantize is None:
        if obstacle := folding_obstacle(tiles, base.linears):
            raise UserError(
                f"no exact merge: {obstacle}; "
                "--to dense, or --requantize affine4 with --to quantized, merge with an error and print it"
            )
        return Recipe(request, "exact", tiles, {}, config.quantization)
    settings = {"linear": request.requantize, "block": None, "double_quant": False}
    if config.quantization.linear == request.requantize:
        settings = {}  # the same blocks as the base
    quantization = config.quantization.model_copy(update=settings)
    new = linear_format(quantization.linear, quantization.block, quantization.double_quant)
    formats = {}
    for path, layer in base.linears.items():
        if layer.format.name != "dense" and (layer.format != new or path in tiles):
            new.check(layer.weight_shape, path)
            formats[path] = new
    return Recipe(request, "requantized", tiles, formats, quantization)


def _require_q4_1(recipe: Recipe, base: BaseModel, tiles: Mapping[str, TileSettings]) -> None:
    for path in tiles:
        format = recipe.formats.get(path, base.linears[path].format)
        if format != GGUF_FORMAT:
            raise UserError(
                f"--to gguf: {path} is {format.describe()}, and GGUF's Q4_1 holds affine4 with block [1, 32] only; "
                "train with quantization.linear: affine4, block: [1, 32], or merge --to quantized"
            )


def lora_rank(settings: TileSettings) -> int:
    """Rank of the LoRA that equals this adapter."""
    if settings.inner is not None:
        return settings.inner
    return min(settings.out_features // settings.repeat, settings.in_features // settings.pool)


def require_low_rank(path: str, settings: TileSettings) -> None:
    """Refuse an adapter whose LoRA pair would hold as many numbers as dW itself."""
    rank, rows, columns = lora_rank(settings), settings.out_features, settings.in_features
    if rank * (rows + columns) >= rows * columns:
        raise UserError(
            f"--to peft: dW of {path} has rank {rank}, a LoRA of that rank is no smaller than the {rows} x {columns} "
            "matrix itself; merge --to dense or quantized"
        )
