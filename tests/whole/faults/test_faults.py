"""Real faults in real runs of two ranks: what the shell sees, what is left, and that the run goes on as if nothing was.

Eight cells of engine x method x fault by default, all of them with DIST_QFT_FAULTS=full. The outcomes are written as
a Markdown table to DIST_QFT_FAULT_TABLE. Moments are random in their phase, from a seed that the cell's name gives.
"""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dist_qft.config.load import save_config
from dist_qft.storage.checkpoint import (
    ADAPTER_MODEL,
    OPTIMIZER,
    TRAINER_STATE,
    fault_in,
    list_checkpoints,
    read_checkpoint,
)
from dist_qft.storage.manifest import MANIFEST
from tests.support.commands import Command
from tests.support.qst_models import qst_config
from tests.support.tiny_model import tiny_config
from tests.support.whole_runs import adapter_digest, train

STEPS = 16
KILLED = 128 + signal.SIGKILL
NF4 = {"quantization": {"linear": "nf4", "block": [64]}}
METHODS = {
    "qlora": {**NF4, "method": {"name": "qlora", "rank": 4}},
    "qbara": {**NF4, "method": {"name": "qbara", "rank": 4, "balance": 2}},
    "qalora": {"method": {"name": "qalora", "rank": 4, "pool": 4}},
    "qahira": {},
    "qst": {},
}
ENGINES = ("fsdp", "zero", "replicated")
MERGED = "merged-dense"

Moment = Callable[[Command, Path, random.Random], None]


def starting(command: Command, run: Path, chance: random.Random) -> None:
    """While ranks import, meet, load and have not taken a step."""
    command.wait_until(run.exists)
    time.sleep(chance.uniform(0, 0.6))


def stepping(command: Command, run: Path, chance: random.Random) -> None:
    """Anywhere in a step: forward, backward, reduction, update; where the config has it, in an evaluation."""
    command.wait_until(lambda: len(list_checkpoints(run)) > 0)
    time.sleep(chance.uniform(0, 0.3))


def saving(command: Command, run: Path, chance: random.Random) -> None:
    """While a checkpoint is written under a temporary name."""
    command.wait_until(lambda: len(list_checkpoints(run)) > 0)
    command.wait_until(lambda: any(run.glob(".tmp-checkpoint-*")))


def pruning(command: Command, run: Path, chance: random.Random) -> None:
    """When the oldest checkpoint has just lost its name and is being removed."""
    command.wait_until((run / "checkpoint-2").exists)
    command.wait_until(lambda: not (run / "checkpoint-2").exists())


def merging(command: Command, run: Path, chance: random.Random) -> None:
    """While the merge that ends the run writes, under a temporary name."""
    command.wait_until(lambda: any(run.glob(f".tmp-{MERGED}-*")))


def by_itself(command: Command, run: Path, chance: random.Random) -> None:
    """The fault needs nobody to cause it."""


def kill(rank: int) -> Callable[[Command], None]:
    return lambda command: command.rank(rank).send_signal(signal.SIGKILL)


def terminate(command: Command) -> None:
    command.process.send_signal(signal.SIGTERM)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def nothing(command: Command) -> None:
    pass


# Run in a mount namespace of their own with the run's folder $1 on a disk of $2 bytes, copied to $1.left in the end.
FULL_DISK = """
run=$1 size=$2; shift 2; mkdir -p $run; mount -t tmpfs -o size=$size tmpfs $run || exit 99
"$@"; code=$?; cp -r $run $run.left; exit $code
"""
# ... and with a folder above it, after the second step, that is empty and read-only.
READ_ONLY = """
run=$1; shift 2; mkdir -p $run; mount -t tmpfs tmpfs $run || exit 99
(until [ -d $run/checkpoint-2 ]; do sleep 0.01; done; mount -t tmpfs -o ro tmpfs $run) &
"$@"; code=$?; umount $run; cp -r $run $run.left; exit $code
"""


@dataclass(frozen=True)
class Fault:
    """What is done at a moment, the exit codes it may give, and what then happens to a file of the last checkpoint.

    Attributes:
        settings: of the run beside the cell's.
        disk: the script that the run is started by, on a disk of its own.
    """

    moment: Moment
    act: Callable[[Command], None] = terminate
    codes: tuple[int, ...] = (75,)
    file: str | None = None
    harm: Callable[[Path], None] | None = None
    settings: tuple[str, ...] = ()
    disk: str | None = None


EVALUATES = ("evaluation.eval_steps=2",)  # which takes longer than the two steps in between
MERGES = ("merge.at_end=dense",)


FAULTS = {
    "SIGKILL rank 0, start": Fault(starting, kill(0), (KILLED,)),
    "SIGKILL rank 1, start": Fault(starting, kill(1), (KILLED,)),
    "SIGKILL rank 0, step": Fault(stepping, kill(0), (KILLED,)),
    "SIGKILL rank 1, step": Fault(stepping, kill(1), (KILLED,)),
    "SIGKILL rank 0, save": Fault(saving, kill(0), (KILLED,)),
    "SIGTERM, start": Fault(starting),
    "SIGTERM, step": Fault(stepping),
    "SIGTERM, save": Fault(saving),
    "SIGKILL rank 0, prune": Fault(pruning, kill(0), (KILLED,)),
    "SIGKILL rank 1, evaluation": Fault(stepping, kill(1), (KILLED,), settings=EVALUATES),
    "SIGTERM, evaluation": Fault(stepping, settings=EVALUATES),
    "SIGKILL rank 0, merge": Fault(merging, kill(0), (KILLED,), settings=MERGES),
    "SIGTERM, merge": Fault(merging, codes=(75, 0), settings=MERGES),  # 0: it came after the last layer
    "disk full": Fault(by_itself, nothing, (3,), disk=FULL_DISK),
    "output read-only": Fault(by_itself, nothing, (3,), disk=READ_ONLY),
    "truncated adapter": Fault(stepping, file=ADAPTER_MODEL, harm=truncate),
    "flipped bit in the optimizer": Fault(stepping, file=OPTIMIZER, harm=flip),
    "missing state": Fault(stepping, file=TRAINER_STATE, harm=Path.unlink),
    "flipped bit in the manifest": Fault(stepping, file=MANIFEST, harm=flip),
}


# One process start costs seconds: these run by default, each under one engine. The rest shows little that these, or
# test_killed_run and test_launch, do not.
OFTEN = (
    "SIGKILL rank 0, start",
    "SIGKILL rank 0, save",
    "SIGKILL rank 0, prune",
    "SIGTERM, evaluation",
    "SIGTERM, merge",
    "disk full",
    "output read-only",
    "truncated adapter",
)


def cells() -> list[tuple[str, str, str]]:
    """(engine, method, fault): every fault under every engine, methods in turn; by default every other fault once."""
    methods = {name: [each for each in METHODS if each != "qst" or FAULTS[name].settings != MERGES] for name in FAULTS}
    every = [
        (engine, methods[name][(e + f) % len(methods[name])], name)
        for f, name in enumerate(FAULTS)
        for e, engine in enumerate(ENGINES)
    ]
    if os.environ.get("DIST_QFT_FAULTS") == "full":
        return every
    return [cell for f, name in enumerate(OFTEN) for cell in every if (cell[0], cell[2]) == (ENGINES[f % 3], name)]


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    rows: list[str] = []
    yield rows
    if path := os.environ.get("DIST_QFT_FAULT_TABLE"):
        head = "| engine | method | fault | exit code | went on from step | seconds to the end |\n"
        Path(path).write_text(head + "|---" * 6 + "|\n" + "".join(rows))


def state_of(run: Path) -> tuple[str, str, str]:
    state = read_checkpoint(run / f"checkpoint-{STEPS}").state
    return adapter_digest(run), state.data_chain, state.history_digest


def train_undisturbed(config):
    train(config)
    return state_of(Path(config.output_dir))


@pytest.fixture(scope="module")
def undisturbed(pools, tiny_llama, tmp_path_factory) -> Callable[[str, str], tuple[Path, tuple]]:
    """The config of an engine and method, and what a run of it ends with when nothing happens."""
    known: dict[tuple[str, str], tuple[Path, tuple]] = {}

    def get(engine: str, method: str) -> tuple[Path, tuple]:
        if (engine, method) not in known:
            folder = tmp_path_factory.mktemp(f"{engine}-{method}")
            sections = {
                "train": {"max_steps": STEPS},
                "checkpoint": {"save_steps": 2, "save_total_limit": 3},
                "data": {"eval_samples": 20},
                "sharding": {"engine": engine},
            }
            make_config = qst_config if method == "qst" else tiny_config
            config = make_config(tiny_llama, folder / "run", **sections, **METHODS[method])
            save_config(config, folder / "run.yaml")
            known[engine, method] = folder / "run.yaml", pools[2].run(train_undisturbed, config=config)[0]
        return known[engine, method]

    return get


@pytest.mark.parametrize(("engine", "method", "name"), cells())
def test_after_a_fault_the_run_ends_as_if_there_was_none(undisturbed, table, tmp_path, engine, method, name):
    config, expected = undisturbed(engine, method)
    fault, run = FAULTS[name], tmp_path / "run"
    chance = random.Random(f"{engine} {method} {name}")
    words = ("train", config, f"output_dir={run}", *fault.settings)
    with Command(*words, ranks=2, wrapper=on_disk(fault, run, config.parent / "run")) as command:
        fault.moment(command, run, chance)
        fault.act(command)
        ended = command.finish()
    if fault.disk is not None:
        if ended.code == 99:
            pytest.skip(f"no private mounts here: {ended.err.strip()}")
        run.rmdir()
        shutil.move(f"{run}.left", run)
        assert ended.err.count("error: rank 0: ") == 1, "the rank that writes says why, once"
    assert ended.code in fault.codes, ended.err
    assert "Traceback" not in ended.err
    saved = list_checkpoints(run)
    assert [fault_in(path) for path in saved] == [None] * len(saved), "no torn checkpoint has a checkpoint's name"
    if fault.harm is not None:
        fault.harm(saved[-1] / fault.file)
        saved = saved[:-1]

    started = time.monotonic()
    with Command(*words, "--resume", "auto", ranks=2) as command:
        done = command.finish()
    assert done.code == 0, done.err
    if fault.harm is not None:
        # A manifest that is wrong speaks of another file.
        assert f"refused: {'' if fault.file == MANIFEST else fault.file + ': '}" in done.err
    step = int(saved[-1].name.split("-")[1]) if saved else 0
    assert step in (0, STEPS) or f"resuming from {saved[-1]} at step {step}" in done.err
    assert state_of(run) == expected, "the same bytes, the same samples, the same losses"
    assert not list(run.glob(".tmp-*")), "what the fault left behind is gone"
    if fault.settings == MERGES:
        assert (run / MERGED / "certificate.json").is_file()
    seconds = time.monotonic() - started
    table.append(f"| {engine} | {method} | {name} | {ended.code} | {step} | {seconds:.1f} |\n")


def on_disk(fault: Fault, run: Path, undisturbed: Path) -> tuple[str, ...]:
    """What starts the command with the fault's disk, if it has one: of room for two checkpoints and a half."""
    if fault.disk is None:
        return ()
    pages = sum(-(-file.stat().st_size // 4096) for file in list_checkpoints(undisturbed)[-1].iterdir())
    return ("unshare", "-rm", "sh", "-c", fault.disk, "sh", str(run), str(int(4096 * (2.5 * pages + 20))))
