"""Small collectives: agreements between the ranks, and a barrier for the time in which rank 0 works alone."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist

from dist_qft.errors import DistQFTError, UserError
from dist_qft.ranks import mpi
from dist_qft.ranks.groups import leave_group, new_group

_T = TypeVar("_T")
_MESSAGE_BYTES = 2000  # of an error that rank 0 tells the others

# torch 2.12 renamed the call; both move one flat tensor per rank into one output.
all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_flat = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Started(Protocol):
    """A collective that has been started and goes on by itself."""

    def wait(self) -> object:
        """Have its result in place: on a GPU for later work on the stream, else at once."""


class _Exchanged:
    """The parts that all ranks sent to this one, still to be added up."""

    def __init__(self, whole: torch.Tensor, own: torch.Tensor, group: dist.ProcessGroup | None) -> None:
        self._own, self._received = own, torch.empty_like(whole)
        self._work = dist.all_to_all_single(self._received, whole, group=group, async_op=True)

    def wait(self) -> None:
        self._work.wait()
        self._own.copy_(self._received.view(-1, self._own.numel()).sum(0))


def start_reduce_scatter(whole: torch.Tensor, own: torch.Tensor, group: dist.ProcessGroup | None) -> Started:
    """Start to sum `whole` over ranks; this rank's part of the sum comes into `own`, its part of `whole`.

    (N-1)/N of the bytes of `whole` leave each rank. gloo's own reduce-scatter is an all-reduce whose result is thrown
    away but for a part, which moves twice as much: on CPUs the parts are exchanged and added here.
    """
    if whole.device.type != "cuda":
        return _Exchanged(whole, own, group)
    return _reduce_scatter_flat(own, whole, group=group, async_op=True)


def gather_in_place(
    wholes: Sequence[torch.Tensor], own: Sequence[torch.Tensor], group: dist.ProcessGroup | None
) -> None:
    """Fill each of `wholes` with all ranks' parts; `own` is this rank's, which is already in its place there."""
    # NCCL takes an input that lies in the output; gloo copies the one into the other, which must not overlap.
    works = [
        all_gather_flat(whole, part if part.is_cuda else part.clone(), group=group, async_op=True)
        for whole, part in zip(wholes, own, strict=True)
    ]
    for work in works:
        work.wait()


def gather_table(own: Mapping[int, Sequence[float]], columns: int, device: torch.device) -> dict[int, list[float]]:
    """`columns` numbers for each key, of which every rank has some keys: all of them, in the keys' order. Collective.

    Keys and numbers travel as float64, so keys must be below 2**53.
    """
    rows = [[float(key), *values] for key, values in own.items()]
    table = torch.tensor(rows, dtype=torch.float64, device=device).view(-1, 1 + columns)
    count = torch.tensor([len(rows)], device=device)
    counts = [torch.empty_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    sizes = [int(size) for size in counts]
    padded = table.new_zeros(max(sizes), 1 + columns)
    padded[: len(rows)] = table
    everyone = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(everyone, padded)
    found = torch.cat([part[:size] for part, size in zip(everyone, sizes, strict=True)]).tolist()
    return {int(key): values for key, *values in sorted(found)}


def require_same_inputs(inputs: Mapping[str, str], device: torch.device) -> None:
    """Stop every rank, before the base is loaded, if the ranks were started with different inputs. Collective.

    A process without a group has nobody to differ from.

    Args:
        inputs: name -> text that must be the same on all ranks (config, data digest, versions, ...).

    Raises:
        UserError: on all ranks, naming the input and the ranks that differ from rank 0.
    """
    if not dist.is_initialized():
        return
    names = sorted(inputs)
    # Digests in a tensor of fixed size instead of pickled objects: unpickling would run code that a peer sends.
    own = torch.tensor([_short_digest(inputs[name]) for name in names], device=device)
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, own)
    for index, name in enumerate(names):
        digests = [int(other[index]) for other in everyone]
        odd = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if odd:
            ranks = ", ".join(map(str, odd))
            raise everywhere(UserError(f"ranks were started with different {name}: rank {ranks} differs from rank 0"))


def everywhere(error: DistQFTError) -> DistQFTError:
    """Mark an error that every rank raises at the same point: it is printed once, not once per rank."""
    error.everywhere = True
    return error


def on_rank_0(action: Callable[[], _T], device: torch.device) -> _T | None:
    """Run `action` on rank 0 alone and return its value there, None elsewhere. Collective.

    Raises:
        DistQFTError: the one that `action` raised, on every rank, so that all end with its exit code. Any other error
            is raised on rank 0 as it is, and on the others as one that names it.
    """
    result: _T | None = None
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            result = action()
        except Exception as error:
            failure = error
    message = torch.zeros(1 + _MESSAGE_BYTES, dtype=torch.int32, device=device)
    if failure is not None:
        told = failure if isinstance(failure, DistQFTError) else _unexpected(failure)
        text = str(told).encode(errors="replace")[:_MESSAGE_BYTES]
        message[: 1 + len(text)] = torch.tensor([told.exit_code, *text], dtype=torch.int32)
    dist.broadcast(message, src=0)
    code, *content = message.tolist()
    if failure is not None:
        raise everywhere(failure) if isinstance(failure, DistQFTError) else failure
    if code:
        kinds = {kind.exit_code: kind for kind in DistQFTError.__subclasses__()}
        reason = bytes(byte for byte in content if byte).decode(errors="replace")
        raise everywhere(kinds.get(code, DistQFTError)(reason))
    return result


def _unexpected(error: Exception) -> DistQFTError:
    """Other ranks' word for an error of rank 0 that is a bug, whose traceback rank 0 shows."""
    return DistQFTError(f"an error on rank 0 (see its traceback): {type(error).__name__}: {error}")


def maximum(value: float, device: torch.device) -> float:
    """The largest `value` over all ranks. Collective."""
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor)


class SideGroup:
    """A barrier at which the ranks wait while rank 0 works alone, with a timeout of its own. Making one is collective.

    Over MPI if it started us, else over a gloo group: neither the training group's timeout nor, on CUDA, its streams
    have a part in it.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        self._mpi = mpi.communicator()
        if self._mpi is None:
            self._group = new_group(torch.device("cpu"), timeout_seconds)

    def close(self) -> None:
        """Give the group up."""
        if self._mpi is None:
            leave_group(torch.device("cpu"), self._group)

    def barrier(self) -> None:
        """Wait for all ranks; raises PeerLostError or RuntimeError if they do not all come in time."""
        if self._mpi is None:
            dist.barrier(self._group)
        else:
            mpi.barrier(self._mpi, self.timeout_seconds)


def _short_digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)
