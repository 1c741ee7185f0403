"""Memory that runs out, on a GPU or not, as one line with what takes less, instead of a traceback."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from dist_qft.errors import OutOfMemoryError

# What torch raises as a plain RuntimeError: its CPU allocator, the driver itself, and cuBLAS for its workspace.
_SIGNS = re.compile(
    "DefaultCPUAllocator: (?:can't allocate|not enough) memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED"
)
_TRIED = re.compile(r"tried to allocate ([\d.]+) (bytes|[KMGT]iB)", re.IGNORECASE)
_HELPS = (
    "less is taken by a smaller train.per_device_train_batch_size or data.max_length, "
    "train.gradient_checkpointing=true, a lower rank, or more ranks with sharding.engine=fsdp; "
    "`dist-qft validate CONFIG --memory SIZE` tells beforehand"
)


@contextmanager
def memory_reported(doing: Callable[[], str]) -> Iterator[None]:
    """Context in which an allocation that fails becomes an OutOfMemoryError with the present activity.

    Args:
        doing: returns the activity, such as "step 12".
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise OutOfMemoryError(f"{doing()}: out of memory{_size_of(error)}\n{_HELPS}") from error


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or bool(_SIGNS.search(str(error)))


def _size_of(error: Exception) -> str:
    """The allocation that failed in words, such as ", for 2.00 GiB more"; empty if the error does not say it."""
    tried = _TRIED.search(str(error))
    if tried is None:
        return ""
    number, unit = tried.groups()
    return f", for {int(number) / 2**30:.2f} GiB more" if unit == "bytes" else f", for {number} {unit} more"
