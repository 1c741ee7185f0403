"""A run of a study that fails: on every rank it is a result, on one rank alone the end of that rank."""

import time
import zlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dist_qft.errors import NumericError, UserError
from dist_qft.ranks.activity import Activity
from dist_qft.ranks.peers import Peers
from dist_qft.ranks.preemption import StopSignal
from dist_qft.ranks.world import World
from dist_qft.study.result_file import read_result
from dist_qft.study.rows import expand
from dist_qft.study.runner import Runner
from dist_qft.study.settings import load_study
from tests.support.study_files import PRESETS, write_study

CPU = torch.device("cpu")


class Breaking(Runner):
    """A runner whose run fails on some ranks, while the others wait for them in a collective."""

    def __init__(self, peers: Peers, failing: dict[int, Exception]) -> None:
        world = World(dist.get_rank(), 2, dist.get_rank(), 2, "127.0.0.1", 0, "environment")
        super().__init__(world, CPU, StopSignal(), peers, Activity())
        self.failing = failing

    def _measured(self, row, started):
        if error := self.failing.get(dist.get_rank()):
            raise error
        dist.barrier()
        raise UserError("the others came")


def outcome(study: Path, failing: dict[int, Exception]) -> tuple[str, int, float, bool]:
    """This rank's result of the run, or the error that ends it; the seconds until then, and if a result is stored."""
    row = expand(load_study(study))[0]
    peers = Peers(lambda: "step 1", CPU, 60)
    started = time.monotonic()
    try:
        result = Breaking(peers, failing).run(row)
        found = str(result.error), result.exit_code
    except Exception as error:
        found = f"ended by {type(error).__name__}", 0
    seconds = time.monotonic() - started
    if found[0].startswith("ended"):
        stored = read_result(row.folder)
        assert stored is not None and stored.error == "only here"
        dist.barrier()  # for which the other one waits; a rank of a real study is gone by now
    peers.close(in_order=True)
    return *found, seconds, (row.folder / "result.json").exists()


@pytest.fixture
def study(tiny_llama, tmp_path, request):
    """One of this test alone: the ranks of a pool keep what they told each other."""
    return write_study(tmp_path, tiny_llama, presets=PRESETS[:1], seeds=[zlib.crc32(request.node.name.encode())])


def test_an_error_of_every_rank_is_the_run_s_result_on_each(pools, study):
    failing = {rank: ValueError("everywhere") for rank in range(2)}
    found = pools[2].run(outcome, study=study, failing=failing)
    assert [each[:2] for each in found] == [("everywhere", 1)] * 2
    assert all(seconds < 2 for *_, seconds, _ in found)


def test_an_error_that_all_ranks_know_of_is_not_asked_for(pools, study):
    failing = {rank: NumericError("step 4: replicas differ") for rank in range(2)}
    found = pools[2].run(outcome, study=study, failing=failing)
    assert [each[:2] for each in found] == [("step 4: replicas differ", 6)] * 2


@pytest.mark.parametrize("error", [ValueError("only here"), UserError("only here")], ids=repr)
def test_a_rank_that_fails_alone_records_it_and_ends(pools, study, error):
    first, second = pools[2].run(outcome, study=study, failing={1: error})
    assert second[0] == f"ended by {type(error).__name__}" and 10 <= second[2] < 15
    assert second[3]
    assert first[0] == "the others came"  # but for the test's barrier it would have found rank 1 gone
