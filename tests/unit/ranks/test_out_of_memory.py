"""Memory that runs out becomes one line: real allocations that fail, and the texts that a GPU's have."""

import pytest
import torch

from dist_qft.errors import OutOfMemoryError
from dist_qft.ranks.memory import memory_reported

GPU = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.00 GiB is free."
)


def on_the_cpu():
    torch.empty(2**50, dtype=torch.uint8)


def in_python():
    bytearray(2**62)


def raising(error: Exception):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("work", "size"),
    [
        (on_the_cpu, ", for 1048576.00 GiB more"),
        (in_python, ""),
        (raising(torch.OutOfMemoryError(GPU)), ", for 2.50 GiB more"),
        (raising(RuntimeError("CUDA error: out of memory\nCompile with")), ""),
        (raising(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")), ""),
    ],
)
def test_it_is_one_line_with_the_activity_the_size_and_what_takes_less(work, size):
    with pytest.raises(OutOfMemoryError) as failure, memory_reported(lambda: "step 12"):
        work()
    first, helps = str(failure.value).splitlines()
    assert first == f"step 12: out of memory{size}"
    assert "train.per_device_train_batch_size" in helps and failure.value.exit_code == 3
    assert failure.value.__cause__ is not None


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), memory_reported(lambda: "step 12"):
        torch.ones(2, 3) @ torch.ones(2, 3)
