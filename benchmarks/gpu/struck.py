"""`dist_qft` with a bug of one rank: its third step raises an error there, and the other ranks wait for it."""

import os
from typing import Any

from dist_qft.__main__ import run
from dist_qft.training.train_step import StepResult, TrainStep

RANK, SAID = 1, "out of luck"

_run = TrainStep.run


def _struck(self: TrainStep, step: int, *arguments: Any, **options: Any) -> StepResult:
    if step == 2 and os.environ["RANK"] == str(RANK):
        raise RuntimeError(SAID)
    return _run(self, step, *arguments, **options)


TrainStep.run = _struck  # type: ignore[method-assign]  # the bug

if __name__ == "__main__":
    run()
