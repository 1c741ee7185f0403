"""`--to quantized`: weights as they are packed, in our own folder (see `base_model.quantized_folder`)."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dist_qft.base_model.quantized_folder import (
    QUANTIZATION_FILE,
    SINGLE_FILE,
    WEIGHTS_NAME,
    manifest_of,
    transformers_settings,
)
from dist_qft.base_model.skeleton import BaseModel
from dist_qft.config.schema import RunConfig
from dist_qft.merge.difference import Difference
from dist_qft.merge.live_model import LiveModel
from dist_qft.merge.recipe import MergeRequest, Recipe, quantized_recipe
from dist_qft.merge.target import CardText, Writer
from dist_qft.merge.token_rows import rounding_notes
from dist_qft.merge.writers.folder import FolderWriter
from dist_qft.merge.writers.merged_model import MergedModel
from dist_qft.merge.writers.requantize import requantized
from dist_qft.merge.writers.safetensors_folder import Entry
from dist_qft.methods.adapters.schedule import TileSettings
from dist_qft.quant.contract import Format


class QuantizedTarget(MergedModel):
    """The base's own formats where dW folds exactly, or new ones with `--requantize`."""

    name = "quantized"
    default_name = "merged-quantized"
    requantizes = True
    card = CardText("python", 'dist_qft.load("{name}").generate("...")', relation="quantized")

    def recipe(
        self, request: MergeRequest, config: RunConfig, base: BaseModel, tiles: Mapping[str, TileSettings]
    ) -> Recipe:
        return quantized_recipe(request, config, base, tiles)

    def writer(self, live: LiveModel, recipe: Recipe, config: RunConfig) -> Writer:
        form = PackedForm(live, recipe)
        rows = {path: self.written_rows(path, live, recipe, config) for path in live.token_rows}
        forms = {path: live.weights()[path].format.name for path in rows}
        return FolderWriter(form, live, config, notes=rounding_notes(rows, live.token_rows, forms))


class PackedForm:
    """Folded weights go through as they come; those with a new format are converted here."""

    stem = WEIGHTS_NAME

    def __init__(self, live: LiveModel, recipe: Recipe) -> None:
        self.recipe, self.dtype, self.difference = recipe, live.base.dtype, Difference()
        self._base, self._weights = live.base, live.weights()
        self._adapters, self._rows = live.adapters.by_path, live.token_rows

    def entries(self, path: str) -> dict[str, Entry]:
        weight = self._weights[path]
        if self._format(path).name == "dense":
            name, shape = self._base.library_shape(path)
            return {name: (shape, self.dtype)}
        shapes = self._format(path).packed_shapes(weight.weight_shape)
        return {f"{path}.{name}": (shape, dtype or self.dtype) for name, (shape, dtype) in shapes.items()}

    def tensors(self, path: str, packed: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        new = self.recipe.formats.get(path)
        if new is not None:
            weight = self._weights[path]
            packed = requantized(weight, path, packed, self._adapters.get(path), new, self.difference)
        if path in self._rows:
            packed = self._rows[path].packed_into(packed, self._format(path), path)
        if self._format(path).name == "dense" and (path in self._base.experts or self._weights[path].transposed):
            yield self._base.library_shape(path)[0], self._base.as_library(path, packed["weight"])
            return
        for name, tensor in packed.items():
            yield f"{path}.{name}", tensor

    def extra_files(self) -> dict[str, str]:
        return {QUANTIZATION_FILE: json.dumps(self._manifest(), indent=1) + "\n"}

    def config_entries(self, folder: Path) -> dict[str, Any]:
        index = f"{SINGLE_FILE}.index.json"
        weights_file = index if (folder / index).is_file() else SINGLE_FILE
        return {"quantization_config": transformers_settings(self._manifest(), weights_file)}

    def _manifest(self) -> dict[str, Any]:
        packed = {
            path: (self._format(path), weight.full_shape)
            for path, weight in self._weights.items()
            if self._format(path).name != "dense"
        }
        return manifest_of(self.recipe.quantization, packed)

    def _format(self, path: str) -> Format:
        return self.recipe.formats.get(path, self._weights[path].format)
