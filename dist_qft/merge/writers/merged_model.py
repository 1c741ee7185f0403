"""The part that targets share whose result is a whole model: fold into the base, compare with the weights that will be
written."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from dist_qft.base_model.segment_attention import library_name
from dist_qft.base_model.skeleton import BaseModel
from dist_qft.config.schema import RunConfig
from dist_qft.errors import CorruptFileError
from dist_qft.merge.collective import fold_base
from dist_qft.merge.difference import Difference
from dist_qft.merge.live_model import LiveModel, frozen_weights
from dist_qft.merge.merged_weight import Rows, add_rows, live_rows
from dist_qft.merge.probe import as_written, logits_of
from dist_qft.merge.recipe import Kind, Recipe
from dist_qft.merge.target import Converted, Probe, Target, Writer
from dist_qft.merge.token_rows import TokenRowsInUse, add_token_rows, reading, rounded_rows
from dist_qft.methods.adapters.exact_fold import folded
from dist_qft.methods.adapters.tile_adapter import TileAdapter
from dist_qft.quant.frozen import FrozenWeight
from dist_qft.ranks.device import dtype_name
from dist_qft.tuned_model.loaded_model import open_base


class MergedModel(Target):
    """A target that holds the merged model's weights."""

    @abstractmethod
    def writer(self, live: LiveModel, recipe: Recipe, config: RunConfig) -> Writer:
        """The writer of this target for a base in which everything is folded that folds exactly."""

    def as_read(self, live: LiveModel, recipe: Recipe, config: RunConfig) -> AbstractContextManager[None]:
        """Context in which a folded base computes with the weights that a reader of the result gets."""
        return as_written(live, recipe.formats, recipe.dtype)

    def converted(self, live: LiveModel) -> Iterable[str]:
        """Paths of the weights that an inexact merge writes anew: all, or those that a target overrides this with."""
        return live.weights()

    def written_rows(self, path: str, live: LiveModel, recipe: Recipe, config: RunConfig) -> Tensor:
        """The trained rows of a vocabulary table as a reader of the result gets them, (n, width) float32."""
        return rounded_rows(live.token_rows[path], live.weights()[path].format, path)

    def convert(self, live: LiveModel, recipe: Recipe, config: RunConfig, probe: Probe) -> Converted:
        live.engine.release()  # or layers that are still gathered would keep their old zeros
        rows = {path: self.written_rows(path, live, recipe, config) for path in live.token_rows}
        difference = fold_base(live, recipe, probe.device)
        if dist.get_rank() == 0:
            for path, written in rows.items():
                add_token_rows(difference, written, live.token_rows[path])
        ids = {path: found.ids for path, found in live.token_rows.items()}
        with live.adapters.disabled(), self.as_read(live, recipe, config), reading(live.base, ids, rows):
            logits = logits_of(live.base, probe.ids, probe.device)
        live.engine.release()
        return Converted(logits, difference, self.writer(live, recipe, config))

    def read_back(self, result: Path, kind: Kind, live: LiveModel, probe: Probe) -> tuple[Difference, torch.Tensor]:
        # Weights as they are stored; logits as the run's own compute dtype makes them.
        attention, precision = attention_of(live.base), dtype_name(live.base.dtype)
        written = open_base(result, probe.device, attention, precision="float32")
        difference, adapters = Difference(), live.adapters.by_path
        if kind == "exact":
            for path, adapter in adapters.items():
                _add_folded(difference, path, live.base.matrices[path], written.matrices[path], adapter, result)
        else:
            old, new = live.weights(), frozen_weights(written)
            for path in self.converted(live):
                _add_weights(difference, old[path], new[path], adapters.get(path), live.token_rows.get(path))
        tables = written.tables()
        for path, rows in live.token_rows.items():
            stored = tables[path].rows_of(rows.ids.to(probe.device)).float().cpu()
            add_token_rows(difference, stored, rows)
        if precision != "float32":
            del written, tables
            written = open_base(result, probe.device, attention, precision)
        return difference, logits_of(written, probe.ids, probe.device)


def attention_of(base: BaseModel) -> str:
    """The attention implementation that a base was built with, as `model.attention` names it."""
    return library_name(base.config)


def _add_weights(
    difference: Difference,
    old: FrozenWeight,
    new: FrozenWeight,
    adapter: TileAdapter | None,
    trained: TokenRowsInUse | None,
) -> None:
    """Count written weights against those that the live model computes with, but for rows that are `trained`."""
    written, exact = new.dequantize(), live_rows(old.format, old.packed(), old.weight_shape, adapter)
    if trained is not None:
        written, exact = written[trained.others(0, len(written))], _without(exact, trained)
    add_rows(difference, written, exact, adapter is not None)


def _without(exact: Iterable[Rows], trained: TokenRowsInUse) -> Iterator[Rows]:
    """The rows of a table, given in order, without those that are trained."""
    first = 0
    for rows in exact:
        others = trained.others(first, len(rows.base)).to(rows.base.device)
        first += len(rows.base)
        yield Rows(rows.base[others], rows.live[others])


def _add_folded(
    difference: Difference, path: str, old: FrozenWeight, new: FrozenWeight, adapter: TileAdapter, where: Path
) -> None:
    """Count folded constants against exact sums; every other packed tensor must be the base's own."""
    zeros = old.format.fold_target
    before, after = old.packed(), new.packed()
    if zeros is None or before.keys() != after.keys():
        raise CorruptFileError(f"{where}: {path} is {new.format.name}, no exact merge into {old.format.name}")
    name = zeros.tensor
    for other in before.keys() - {name}:
        if not torch.equal(before[other], after[other]):
            raise CorruptFileError(f"{where}: '{other}' of {path} is not the base's")
    _, sums = folded(before[name].view(-1), 0, before[name].shape[1], zeros.block, adapter)
    difference.add_fold(before[name].view(-1), after[name].view(-1), sums)
