"""The walk over the layers, with all ranks: each folds its own part, rank 0 gets one layer at a time and writes.

Only packed bytes cross the network, and only those that the result needs: for a GGUF file that is patched, the zeros.
A folded part stays on its rank, so afterwards the base is the merged model and runs under its engine.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from dist_qft.errors import CorruptFileError, DistQFTError, NumericError, Preempted, SetupError, UserError
from dist_qft.merge.certificate import Certificate
from dist_qft.merge.certificate_file import Publication, publishing_certified
from dist_qft.merge.difference import Difference
from dist_qft.merge.live_model import LiveModel
from dist_qft.merge.merged_weight import require_range
from dist_qft.merge.recipe import Recipe
from dist_qft.merge.target import OpenResult, Writer
from dist_qft.methods.adapters.exact_fold import folded
from dist_qft.ranks.collectives import SideGroup, everywhere, maximum
from dist_qft.ranks.preemption import StopSignal
from dist_qft.sharding.host_memory import return_freed_memory
from dist_qft.storage.atomic import refused_write

# Errors of one rank that every rank raises. Ranks agree on the largest exit code, so each code is one class.
_SHARED_ERRORS: tuple[type[DistQFTError], ...] = (UserError, SetupError, CorruptFileError, NumericError)
_STOPPED = 0.5  # below every exit code of an error
_UNEXPECTED = 1.0  # of an error that is a bug: its rank ends with its traceback, and the others do not wait for it


class Certified(NamedTuple):
    """A result's certificate, and the text files beside or in the result, by name."""

    certificate: Certificate
    companions: Mapping[str, str]


@torch.no_grad()
def fold_base(live: LiveModel, recipe: Recipe, device: torch.device) -> Difference:
    """Fold every adapter that folds exactly, in place, into the part of the base that each rank holds. Collective.

    Raises:
        NumericError: a sum is not finite; on all ranks.
        UserError: a sum leaves the range of the zeros' dtype; likewise.
    """
    difference = Difference()
    with failing_together(recipe.request.path, device):
        for path, adapter in live.adapters.by_path.items():
            layer = live.base.matrices[path]
            zeros = layer.format.fold_target if recipe.folds(path) else None
            if zeros is None:
                continue
            parameter = getattr(layer, zeros.tensor)
            part = live.engine.local(parameter).view(-1)
            if part.numel() == 0:
                continue
            first, _ = live.engine.span(parameter)
            width = live.engine.shape(parameter)[1]
            written, exact = folded(part, first, width, zeros.block, adapter)
            require_range(written, exact, path)
            difference.add_fold(part, written, exact)
            part.copy_(written)
            del written, exact
            return_freed_memory()  # float64 copies of several layers would stay otherwise
    return difference


def write_result(
    live: LiveModel,
    writer: Writer,
    recipe: Recipe,
    stop: StopSignal,
    device: torch.device,
    side: SideGroup,
    certify: Callable[[Path | None, Difference], Certified | None],
) -> Certified | None:
    """Gather what the writer wants, weight by weight; rank 0 writes and publishes. Collective.

    Args:
        side: where the other ranks wait while rank 0 writes a weight, fills the file up or hashes it.
        certify: called on every rank once all is written, before it is published. Gets the temporary name on rank 0
            (None elsewhere) and the difference that conversions on this rank have made; returns on rank 0 the
            certificate and the texts that go along with the result, by file name.

    Raises:
        UserError: another process is writing the same result; on all ranks.
        SetupError: rank 0 could not write; on all ranks, and nothing is left behind.
        Preempted: some rank was asked to stop; likewise.
    """
    target = recipe.request.path
    publication: Publication | None = None
    with ExitStack() as stack:
        with failing_together(target, device):
            if dist.get_rank() == 0:
                publication = stack.enter_context(publishing_certified(target, recipe.request.overwrite))
        temporary = publication.temporary if publication is not None else None
        certified = certify(temporary, _write_layers(live, writer, target, stop, device, side, temporary))
        with failing_together(target, device, side=side):
            if publication is not None and certified is not None:
                publication.certify(*certified)
            stack.close()  # publishes
    return certified


def _write_layers(
    live: LiveModel,
    writer: Writer,
    target: Path,
    stop: StopSignal,
    device: torch.device,
    side: SideGroup,
    temporary: Path | None,
) -> Difference:
    """Write all weights, on the rank that has a temporary name; returns the difference that conversions have made."""
    result: OpenResult | None = None
    try:
        with failing_together(target, device, stop, side):
            if temporary is not None:
                result = writer.open(temporary)
        for path, weight in live.weights().items():
            wanted = writer.wanted(path)
            if not wanted:
                continue
            packed = {name: live.engine.gather(getattr(weight, name)) for name in wanted}
            with failing_together(target, device, stop, side):
                if result is not None:
                    result.write(path, {name: tensor for name, tensor in packed.items() if tensor is not None})
            del packed  # before the next one is gathered
        with failing_together(target, device, stop, side):
            if result is not None:
                result.finish()
        return result.difference if result is not None else Difference()
    finally:
        if result is not None:
            result.close()


def total_difference(difference: Difference, device: torch.device) -> Difference:
    """The differences that all ranks found, put together; NaN on one rank is NaN on all. Collective."""
    largest = torch.tensor([difference.maximum, difference.steps], dtype=torch.float64, device=device)
    added = (difference.total, difference.count, difference.squares, difference.update_squares)
    # A reduction by maximum may lose a NaN, a sum does not.
    sums = torch.tensor([*added, float(torch.where(largest.isnan(), largest, 0.0).sum())], dtype=torch.float64)
    sums = sums.to(device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    dist.all_reduce(sums)
    (maximum_, steps), (total, count, squares, update_squares, nan) = largest.tolist(), sums.tolist()
    return Difference(maximum_ + nan, total, int(count), steps + nan, squares, update_squares)


@contextmanager
def failing_together(
    target: Path, device: torch.device, stop: StopSignal | None = None, side: SideGroup | None = None
) -> Iterator[None]:
    """Context in which ranks work on their own. At its end all go on, or all raise the error of one. Collective.

    Args:
        side: where ranks wait for one that works longer than a collective may take.

    Raises:
        SetupError: a write failed on some rank. The rank that failed names the reason, the others name the result.
        DistQFTError: an unexpected error on another rank, which raises it as it is.
        Preempted: some rank was asked to `stop`.
    """
    failure: Exception | None = None
    try:
        yield
    except OSError as error:
        failure = refused_write(target, error)
        failure.__cause__ = error
    except Exception as error:
        failure = error
    stopped = _STOPPED if stop is not None and stop.requested else 0.0
    if side is not None:
        side.barrier()
    code = float(failure.exit_code) if isinstance(failure, DistQFTError) else _UNEXPECTED
    worst = maximum(stopped if failure is None else code, device)
    if failure is not None:
        raise everywhere(failure) if isinstance(failure, DistQFTError) else failure
    if worst == _STOPPED:
        raise Preempted(f"stopped by a signal; '{target}' was not written, run the merge again")
    if worst > 0:
        unknown = DistQFTError if worst == _UNEXPECTED else SetupError
        kind = next((kind for kind in _SHARED_ERRORS if kind.exit_code == worst), unknown)
        raise everywhere(kind(f"{target}: another rank failed to write it (see its message)"))
