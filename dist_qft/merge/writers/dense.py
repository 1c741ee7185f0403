"""Weights as plain floats: the form of a Hugging Face folder."""

from collections.abc import Iterator, Mapping

from torch import Tensor

from dist_qft.merge.collective import frozen_weights
from dist_qft.merge.difference import Difference
from dist_qft.merge.merged_weight import merged_rows
from dist_qft.merge.recipe import Recipe
from dist_qft.merge.writers.safetensors_folder import Entry
from dist_qft.tuned_model.assemble import Assembled


class DenseForm:
    """dequantize + dW, rounded once to the folder's dtype, a few rows at a time."""

    stem = "model"

    def __init__(self, parts: Assembled, recipe: Recipe) -> None:
        self.dtype, self.difference = recipe.dtype, Difference()
        self._weights = frozen_weights(parts.base)
        self._adapters = parts.trainables.by_path

    def entries(self, path: str) -> dict[str, Entry]:
        return {f"{path}.weight": (self._weights[path].weight_shape, self.dtype)}

    def tensors(self, path: str, packed: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        weight, adapter = self._weights[path], self._adapters.get(path)
        for exact in merged_rows(weight.format, packed, weight.weight_shape, adapter):
            rows = exact.to(self.dtype)
            self.difference.add(rows, exact)
            yield f"{path}.weight", rows

    def extra_files(self) -> dict[str, str]:
        return {}
