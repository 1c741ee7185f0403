"""`python -m tests.whole.breaking --minutes N [--only KIND ...] [--seed S] [--attempts N] [--attempt NUMBER]`."""

import argparse
import datetime
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

from tests.whole.breaking.attempts import Breaker, Budget, Tally
from tests.whole.breaking.children import warm_up
from tests.whole.breaking.disks import can_mount, disk_filler
from tests.whole.breaking.flips import flipper
from tests.whole.breaking.fuzzing import SPOILERS, fuzzer
from tests.whole.breaking.kills import killer
from tests.whole.breaking.workshop import Workshop, build

_DEPTH = 20_000  # of recursion, for the deep values that are made here

# Share of the time, and attempts of the long run.
KINDS = {"kills": (0.35, 200), "flips": (0.25, 2000), "disks": (0.05, 200)}
KINDS |= {name: (0.35 / len(SPOILERS), 1000) for name in SPOILERS}


def breakers(shop: Workshop) -> dict[str, Breaker]:
    """Every kind of attempt by its name."""
    found = {"kills": killer(shop), "flips": flipper(shop)}
    if can_mount():
        found["disks"] = disk_filler(shop)
    return found | {name: fuzzer(name, shop, spoil) for name, spoil in SPOILERS.items()}


def break_for(
    seconds: float, seed: int, only: list[str], most: int | None, attempt: int | None, folder: Path
) -> list[Tally]:
    """Attempts of every kind in `only`, or of all, which share the time by their weights; `most` of each, if given."""
    warm_up()
    sys.setrecursionlimit(_DEPTH)
    shop = build(folder)
    chosen = {name: breaker for name, breaker in breakers(shop).items() if not only or name in only}
    shares = sum(KINDS[name][0] for name in chosen)
    tallies = []
    for name, breaker in chosen.items():
        share, attempts = KINDS[name]
        tallies.append(breaker(Budget(seed, most or attempts, seconds * share / shares, attempt)))
        print(tallies[-1].line(), flush=True)
    return tallies


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], choices=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--attempts", type=int, help="of each kind, at most")
    parser.add_argument("--attempt", type=int, help="number of a single attempt to repeat")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="breaking-shop-") as folder:
        tallies = break_for(60 * args.minutes, args.seed, args.only, args.attempts, args.attempt, Path(folder) / "shop")
    print(f"\n{datetime.date.today()}, seed {args.seed}\n\n| kind | tried | outcomes | failures |\n|---|---|---|---|")
    print(*(tally.line() for tally in tallies), sep="\n")
    print(*(failure for tally in tallies for failure in tally.failures), sep="\n")
    return int(any(tally.failures for tally in tallies))


if __name__ == "__main__":
    sys.exit(main())
