"""Measure how far the bits of a run depend on its config alone, with `sharding.gradient_sum: invariant`; not a test.

    PYTHONPATH=. python benchmarks/invariance.py [STEPS [CHAINS]]

For every method: STEPS (200) steps on 1, 2, 3 and 4 ranks, then CHAINS (4) runs that stop at random steps and go on
with another number of ranks and another engine. Counts the different adapters and loss histories. A small Llama.
"""

import random
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.support.invariance import METHODS, invariant_run
from tests.support.rank_pool import RankPool
from tests.support.tiny_model import save_tiny_model

WORLDS = (1, 2, 3, 4)
ENGINES = ("fsdp", "zero", "replicated")


def chain(steps: int, choice: random.Random) -> list[tuple[int, int, str]]:
    """(last step, ranks, engine) of two to four parts."""
    ends = [*sorted(choice.sample(range(1, steps), choice.randint(1, 3))), steps]
    return [(end, choice.choice(WORLDS), choice.choice(ENGINES)) for end in ends]


def main(steps: int = 200, chains: int = 4) -> None:
    choice = random.Random(0)
    pools = {size: RankPool(size) for size in WORLDS}
    with TemporaryDirectory() as root:
        model = save_tiny_model(Path(root) / "model")
        for number, method in enumerate(METHODS):
            started, parts, outcomes = time.perf_counter(), 0, set()
            ways = [[(steps, world, "fsdp")] for world in WORLDS] + [chain(steps, choice) for _ in range(chains)]
            for index, way in enumerate(ways):
                folder = Path(root) / f"{number}-{index}"
                for end, world, engine in way:
                    losses, digest = invariant_run(
                        pools[world], model, folder, method, engine, max_steps=end, resume="auto"
                    )
                    parts += 1
                outcomes.add((tuple(losses), digest))
            print(
                f"{method}: {len(outcomes)} outcome of {steps} steps on 1, 2, 3 and 4 ranks and in {chains} chains "
                f"({parts} parts, {time.perf_counter() - started:.0f} s); "
                f"adapter {', '.join(digest[:12] for _, digest in outcomes)}",
                flush=True,
            )
    for pool in pools.values():
        pool.close()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
