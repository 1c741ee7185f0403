"""A step asks the device for values twice, and its micro-batches never: on a GPU the host would wait each time."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dist_qft.config.schema import RunConfig
from dist_qft.training.train_step import TrainStep
from tests.support.tiny_model import tiny_config
from tests.support.whole_runs import METHODS, train

_READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::masked_select")


class Reads(TorchDispatchMode):
    """Counts the operations whose result Python, or the shape of a tensor, depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name() in _READS:
            self.found[function.name()] += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Reads]:
    """Reads inside, `tolist` included, which no mode sees."""
    tolist, reads = Tensor.tolist, Reads()

    def counting(tensor: Tensor) -> list:
        reads.found["tolist"] += 1
        return tolist(tensor)

    Tensor.tolist = counting  # type: ignore[method-assign]
    try:
        with reads:
            yield reads
    finally:
        Tensor.tolist = tolist  # type: ignore[method-assign]


def reads_per_step(config: RunConfig) -> list[tuple[int, int]]:
    """For each step: reads within its micro-batches, and all of them."""
    found = []
    run, accumulate = TrainStep.run, TrainStep._accumulate
    inner: list[int] = []

    def counted_accumulate(self, *args):
        with counted() as reads:
            accumulate(self, *args)
        inner.append(reads.found.total())

    def counted_run(self, *args, **kwargs):
        with counted() as reads:
            result = run(self, *args, **kwargs)
        found.append((inner[-1], reads.found.total()))
        return result

    TrainStep.run, TrainStep._accumulate = counted_run, counted_accumulate
    try:
        train(config)
    finally:
        TrainStep.run, TrainStep._accumulate = run, accumulate
    return found


@pytest.mark.parametrize("method", ["qlora", "qahira, merge-aware"])
def test_reads_of_a_step(pools, tiny_llama, tmp_path, method):
    sections = {**METHODS[method], "sharding": {"engine": "replicated"}}
    sections["train"] = {"max_steps": 3, "global_batch_size": 4, "per_device_train_batch_size": 2}
    config = tiny_config(tiny_llama, tmp_path / "run", **sections)
    (found,) = pools[1].run(reads_per_step, config=config)
    assert len(found) == 3
    assert all(inside == 0 and whole <= 2 for inside, whole in found), found
