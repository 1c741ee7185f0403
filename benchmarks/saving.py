"""The cost of checkpoints to a training step: steps of one run with and without a save every 10, in turns.

    python benchmarks/saving.py CONFIG ROUNDS [key.sub=value ...]

Rounds of 10 steps alternate between saving after the last one and not saving; the same run, the same process, so that
whatever else the machine does meets both. Prints the median of the rounds' seconds and the cost. Single process.
"""

import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from dist_qft.config.load import load_config
from dist_qft.ranks.connection import connect
from dist_qft.ranks.preemption import StopSignal
from dist_qft.ranks.world import World
from dist_qft.train import gather_inputs
from dist_qft.training.training_run import TrainingRun
from dist_qft.tuned_model.assemble import assemble

STEPS = 10


def main(path: str, rounds: int, *changes: str) -> None:
    with TemporaryDirectory() as folder:
        overrides = [*changes, f"output_dir={folder}/run", "train.max_steps=100000", "checkpoint.save_steps=100000"]
        config = load_config(Path(path), overrides)
        world, device, stop = World.from_environment(), torch.device("cpu"), StopSignal()
        inputs = gather_inputs(config, None, world, device)
        with connect(world, device, 600):
            run = TrainingRun(inputs, assemble(config, inputs.skeleton, inputs.spec, device, inputs.source), stop)
            run.prepare()
            run.parts.trainables.train()
            seconds: dict[bool, list[float]] = {True: [], False: []}
            for count in range(2 * rounds):
                saves = count % 2 == 0
                started = time.perf_counter()
                for step in range(STEPS):
                    run.run_step()
                    # As in training, the thread works during the steps that follow: those belong to its round.
                    if saves and step == 0:
                        run.save()
                run.checkpoints.wait()
                seconds[saves].append(time.perf_counter() - started)
            run.close()
    with_saves, without = (statistics.median(seconds[saves]) for saves in (True, False))
    print(f"{rounds} rounds of {STEPS} steps: {with_saves:.3f} s with a checkpoint, {without:.3f} s without")
    print(f"cost: {100 * (with_saves / without - 1):.1f} % of a step")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
