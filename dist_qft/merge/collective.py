"""The walk over the layers, with all ranks: everyone folds what it holds, rank 0 gets one layer at a time and writes.

Only packed bytes cross the network, and only those that the result needs: for a GGUF file that is patched, the zeros.
What a rank folds stays where it is, so afterwards the base is the merged model and runs under its engine.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dist_qft.base_model.skeleton import BaseModel
from dist_qft.errors import DistQFTError, Preempted, SetupError
from dist_qft.merge.difference import Difference
from dist_qft.merge.merged_weight import require_finite
from dist_qft.merge.recipe import Recipe
from dist_qft.methods.adapters.exact_fold import folded, folding_tensor
from dist_qft.quant.frozen import FrozenWeight
from dist_qft.ranks.collectives import everywhere, maximum
from dist_qft.ranks.preemption import StopSignal
from dist_qft.sharding.host_memory import return_freed_memory
from dist_qft.storage.atomic import publishing, refused_write
from dist_qft.tuned_model.assemble import Assembled


class Writer(Protocol):
    """One kind of result. Every rank has one, to agree on what is gathered; only rank 0's writes.

    The order of calls is `begin`, `write` for each weight, `finish`; `close` comes last in any case. What a
    converted weight loses is added to `difference`.
    """

    difference: Difference

    def notes(self) -> list[str]:
        """Where the result will not be quite the model that was run, in words."""

    def wanted(self, path: str) -> tuple[str, ...]:
        """The packed tensors of this weight that `write` needs; without any, it is not called."""

    def begin(self, temporary: Path) -> None:
        """Start the file or folder under this name."""

    def write(self, path: str, packed: Mapping[str, Tensor]) -> None:
        """Take one weight's tensors, whole and on the CPU."""

    def finish(self) -> None:
        """Write what is left."""

    def close(self) -> None:
        """Give up open files; the temporary result is removed by whoever chose its name."""


def frozen_weights(base: BaseModel) -> dict[str, FrozenWeight]:
    """All packed weights by module path, in the order of the walk."""
    return {**base.linears, **base.tables()}


@torch.no_grad()
def fold_base(parts: Assembled, recipe: Recipe) -> Difference:
    """Fold every adapter that folds exactly, in place, into the part of the base that this rank holds."""
    difference = Difference()
    for path, adapter in parts.trainables.by_path.items():
        if not recipe.folds(path):
            continue
        layer = parts.base.linears[path]
        name, block = folding_tensor(layer.format)
        parameter = getattr(layer, name)
        part = parts.engine.local(parameter).view(-1)
        if part.numel() == 0:
            continue
        first, _ = parts.engine.span(parameter)
        width = parts.engine.shape(parameter)[1]
        written, exact = folded(part, first, width, block, adapter)
        require_finite(written, path)
        difference.add_fold(part, written, exact)
        part.copy_(written)
        del written, exact
        return_freed_memory()  # float64 copies of several layers would stay otherwise
    return difference


def write_result(
    parts: Assembled,
    writer: Writer,
    recipe: Recipe,
    stop: StopSignal,
    device: torch.device,
    certify: Callable[[Path | None], None],
) -> None:
    """Gather what the writer wants, weight by weight; rank 0 writes and publishes. Collective.

    Args:
        certify: called on every rank once all is written, before it is published: a result without its certificate
            would pass for one that is done. Gets the temporary name on rank 0, None elsewhere.

    Raises:
        SetupError: rank 0 could not write; on all ranks, and nothing is left behind.
        Preempted: some rank was asked to stop; likewise.
    """
    target, writes = recipe.request.path, dist.get_rank() == 0
    with publishing(target, recipe.request.overwrite) if writes else nullcontext() as temporary:
        try:
            with _together(target, stop, device):
                if writes:
                    writer.begin(temporary)
            for path, weight in frozen_weights(parts.base).items():
                wanted = writer.wanted(path)
                if not wanted:
                    continue
                packed = {name: parts.engine.gather(getattr(weight, name)) for name in wanted}
                with _together(target, stop, device):
                    if writes:
                        writer.write(path, packed)
                del packed  # before the next one is gathered
            with _together(target, stop, device):
                if writes:
                    writer.finish()
            with _together(target, stop, device):
                certify(temporary)
        finally:
            writer.close()
    dist.barrier()


def total_difference(difference: Difference, device: torch.device) -> Difference:
    """What the ranks found, put together. Collective."""
    largest = torch.tensor([difference.maximum, difference.steps], dtype=torch.float64, device=device)
    added = (difference.total, difference.count, difference.squares, difference.update_squares)
    sums = torch.tensor(added, dtype=torch.float64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    dist.all_reduce(sums)
    (maximum, steps), (total, count, squares, update_squares) = largest.tolist(), sums.tolist()
    return Difference(maximum, total, int(count), steps, squares, update_squares)


@contextmanager
def _together(target: Path, stop: StopSignal, device: torch.device) -> Iterator[None]:
    """Inside, rank 0 does something while the others wait; afterwards all ranks go on or all stop. Collective."""
    failure: OSError | DistQFTError | None = None
    try:
        yield
    except (OSError, DistQFTError) as error:
        failure = error
    worst = maximum(2.0 if failure else float(stop.requested), device)
    if isinstance(failure, OSError):
        raise everywhere(refused_write(target, failure)) from failure
    if failure:
        raise everywhere(failure)
    if worst == 2.0:
        raise everywhere(SetupError(f"{target}: rank 0 could not write it and says why"))
    if worst == 1.0:
        raise Preempted(f"stopped by a signal; '{target}' was not written, run the merge again")
