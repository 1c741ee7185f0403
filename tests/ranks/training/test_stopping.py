"""A run that is told to stop while it answers prompts, and one whose saves are slower than its steps."""

import time

import torch

from dist_qft.config.schema import RunConfig
from dist_qft.errors import Preempted
from dist_qft.ranks.preemption import StopSignal
from dist_qft.storage import saving
from dist_qft.train import execute_run, gather_inputs
from dist_qft.training.checkpointing import Checkpointing
from dist_qft.training.evaluations import Evaluations
from tests.support.tiny_model import tiny_config
from tests.support.whole_runs import adapter_digest, pool_world, train, train_only

SLOW_SECONDS = 1.5


def go_on(config: RunConfig) -> None:
    train(config, "auto")


class Armed(StopSignal):
    """A signal that the ranks notice where they ask each other, once it is armed."""

    armed = False

    def any_rank(self) -> bool:
        return self.armed


def stopped_in_an_answer(config: RunConfig) -> str:
    """The words of a run that is stopped in its answers after step 2."""
    stop, original = Armed(), Evaluations.answer_prompts

    def answer(self: Evaluations, which: str, step: int, given: StopSignal) -> None:
        stop.armed = which == "eval"
        original(self, which, step, given)

    Evaluations.answer_prompts = answer
    try:
        execute_run(gather_inputs(config, None, pool_world(), torch.device("cpu")), stop)
    except Preempted as error:
        return str(error)
    finally:
        Evaluations.answer_prompts = original
    return "not stopped"


def test_a_run_that_is_stopped_in_an_answer_saves_and_goes_on(pools, tiny_llama, tmp_path):
    asked = {"eval_steps": 2, "prompts": ["Say cat 3:"], "max_new_tokens": 8}

    def config(name: str) -> RunConfig:
        return tiny_config(tiny_llama, tmp_path / name, evaluation=asked)

    pools[2].run(train_only, config=config("whole"))
    words = "stopped by a signal after step 2, which is saved; continue with --resume auto"
    assert pools[2].run(stopped_in_an_answer, config=config("parts")) == [words] * 2
    pools[2].run(go_on, config=config("parts"))
    assert adapter_digest(tmp_path / "parts") == adapter_digest(tmp_path / "whole")


def ends(config: RunConfig) -> tuple[list[float], list[float]]:
    """Times at which this rank came out of each save, and at which rank 0 had written it, `SLOW_SECONDS` later."""
    left: list[float] = []
    written: list[float] = []
    write, save = saving.write_checkpoint, Checkpointing.save

    def slow(*arguments: object) -> None:
        time.sleep(SLOW_SECONDS)
        write(*arguments)
        written.append(time.monotonic())

    def timed(self: Checkpointing) -> None:
        save(self)
        left.append(time.monotonic())

    saving.write_checkpoint, Checkpointing.save = slow, timed
    try:
        train(config)
    finally:
        saving.write_checkpoint, Checkpointing.save = write, save
    return left, written


def test_all_ranks_wait_for_a_save_where_the_next_one_begins(pools, tiny_llama, tmp_path):
    """Not in a step, whose collectives have a shorter timeout than rank 0's own work."""
    config = tiny_config(tiny_llama, tmp_path / "run", train={"max_steps": 3}, checkpoint={"save_steps": 1})
    (first, written), (second, _) = pools[2].run(ends, config=config)
    assert len(first) == len(second) == len(written) == 3
    for left in (first, second):
        assert left[0] < written[0] < left[1] < written[1] < left[2] < written[2]
