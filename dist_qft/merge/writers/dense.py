"""`--to dense`: a Hugging Face folder whose weights are plain floats."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_qft.base_model.skeleton import BaseModel
from dist_qft.config.schema import QuantizationConfig, RunConfig
from dist_qft.merge.difference import Difference
from dist_qft.merge.live_model import LiveModel
from dist_qft.merge.merged_weight import live_rows, require_numbers, require_range
from dist_qft.merge.recipe import DTYPES, MergeRequest, Recipe
from dist_qft.merge.target import CardText, Writer
from dist_qft.merge.writers.folder import FolderWriter
from dist_qft.merge.writers.merged_model import MergedModel
from dist_qft.merge.writers.safetensors_folder import Entry
from dist_qft.methods.adapters.schedule import TileSettings


class DenseTarget(MergedModel):
    """dequantize + dW in one float dtype; any adapter merges into it."""

    name = "dense"
    default_name = "merged-dense"
    card = CardText(
        "python",
        'AutoModelForCausalLM.from_pretrained("{name}")  # transformers; vLLM: vllm serve {name}',
        library="transformers",
    )

    def recipe(
        self, request: MergeRequest, config: RunConfig, base: BaseModel, tiles: Mapping[str, TileSettings]
    ) -> Recipe:
        return Recipe(request, "dense", tiles, {}, QuantizationConfig(linear="dense", embedding="dense"))

    def written_rows(self, path: str, live: LiveModel, recipe: Recipe, config: RunConfig) -> Tensor:
        rows = live.token_rows[path]
        rounded = rows.live.to(DTYPES[recipe.request.dtype])
        require_range(rounded, rows.live, path)
        return rounded.float()

    def writer(self, live: LiveModel, recipe: Recipe, config: RunConfig) -> Writer:
        form = DenseForm(live, DTYPES[recipe.request.dtype])
        return FolderWriter(form, live, config, float_rows=form.rows)


class DenseForm:
    """The live model's weights, rounded once to the folder's dtype, a few rows at a time."""

    stem = "model"

    def __init__(self, live: LiveModel, dtype: torch.dtype) -> None:
        self.dtype, self.difference = dtype, Difference()
        self._base, self._weights = live.base, live.weights()
        self._adapters, self._rows = live.adapters.by_path, live.token_rows

    def entries(self, path: str) -> dict[str, Entry]:
        name, shape = self._base.library_shape(path)
        return {name: (shape, self.dtype)}

    def tensors(self, path: str, packed: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        name, _ = self._base.library_shape(path)
        pieces = self.rows(path, packed)
        if self._weights[path].transposed:
            yield name, self._base.as_library(path, torch.cat(list(pieces)))
        else:
            yield from ((name, rows) for rows in pieces)

    def rows(self, path: str, packed: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """A weight with its adapter's dW in pieces of consecutive rows, outputs before inputs."""
        weight, adapter, trained = self._weights[path], self._adapters.get(path), self._rows.get(path)
        first = 0
        for exact in live_rows(weight.format, packed, weight.weight_shape, adapter):
            require_numbers(exact.live, path)
            rows = exact.live.to(self.dtype)
            require_range(rows, exact.live, path)
            if trained is None:
                self.difference.add(rows, exact.live, None if adapter is None else exact.base)
            else:  # `MergedModel.convert` has counted those rows
                others = trained.others(first, len(rows))
                self.difference.add(rows[others], exact.live[others])
                rows = trained.put_into(rows, first)
            first += len(rows)
            yield rows

    def extra_files(self) -> dict[str, str]:
        return {}

    def config_entries(self, folder: Path) -> dict[str, Any]:
        return {}
