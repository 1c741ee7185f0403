"""Weights as they are packed: the form of our own folder (see `base_model.quantized_folder`)."""

import json
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dist_qft.base_model.quantized_folder import QUANTIZATION_FILE, WEIGHTS_NAME, manifest_of
from dist_qft.merge.collective import frozen_weights
from dist_qft.merge.difference import Difference
from dist_qft.merge.merged_weight import merged_weight
from dist_qft.merge.recipe import Recipe
from dist_qft.merge.writers.safetensors_folder import Entry
from dist_qft.quant.contract import Format
from dist_qft.tuned_model.assemble import Assembled


class PackedForm:
    """Folded weights go through as they come; those with a new format are converted here."""

    stem = WEIGHTS_NAME

    def __init__(self, parts: Assembled, recipe: Recipe) -> None:
        self.recipe, self.dtype, self.difference = recipe, parts.base.dtype, Difference()
        self._weights = frozen_weights(parts.base)
        self._adapters = parts.trainables.by_path

    def entries(self, path: str) -> dict[str, Entry]:
        shapes = self._format(path).packed_shapes(self._weights[path].weight_shape)
        return {f"{path}.{name}": (shape, dtype or self.dtype) for name, (shape, dtype) in shapes.items()}

    def tensors(self, path: str, packed: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        if path in self.recipe.formats:
            packed = self._requantized(path, packed)
        for name, tensor in packed.items():
            yield f"{path}.{name}", tensor

    def extra_files(self) -> dict[str, str]:
        packed = {
            path: (self._format(path), weight.weight_shape)
            for path, weight in self._weights.items()
            if self._format(path).name != "dense"
        }
        return {QUANTIZATION_FILE: json.dumps(manifest_of(self.recipe.quantization, packed), indent=1) + "\n"}

    def _format(self, path: str) -> Format:
        return self.recipe.formats.get(path, self._weights[path].format)

    def _requantized(self, path: str, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        weight, new = self._weights[path], self.recipe.formats[path]
        exact = merged_weight(weight.format, packed, weight.weight_shape, self._adapters.get(path), torch.float32)
        written = new.quantize(exact, path)
        self.difference.add(new.dequantize(written, weight.weight_shape, torch.float32), exact)
        return written
