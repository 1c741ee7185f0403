"""Real faults in real runs of two ranks: what the shell sees, what is left, and that the run goes on as if nothing was.

Twelve cells of engine x method x fault by default; all of them with DIST_QFT_FAULTS=full. DIST_QFT_FAULT_TABLE=PATH has
the outcomes written as a Markdown table. Moments are random within their phase, from a seed that the cell's name gives.
"""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import Command
from tiny_model import tiny_config
from whole_runs import adapter_digest

from dist_qft.checkpoint import ADAPTER_MODEL, OPTIMIZER, TRAINER_STATE, fault_in, list_checkpoints, read_checkpoint
from dist_qft.config.load import save_config
from dist_qft.manifest import MANIFEST

STEPS = 16
KILLED = 128 + signal.SIGKILL
NF4 = {"quantization": {"linear": "nf4", "block": [64]}}
METHODS = {
    "qlora": {**NF4, "method": {"name": "qlora", "rank": 4, "pool": None, "repeat": None}},
    "qbara": {**NF4, "method": {"name": "qbara", "rank": 4, "balance": 2, "pool": None, "repeat": None}},
    "qalora": {"method": {"name": "qalora", "rank": 4, "pool": 4, "repeat": None}},
    "qahira": {},
}
ENGINES = ("fsdp", "zero", "replicated")

Moment = Callable[[Command, Path, random.Random], None]


def starting(command: Command, run: Path, chance: random.Random) -> None:
    """While ranks import, meet, load and have not taken a step."""
    command.wait_until(run.exists)
    time.sleep(chance.uniform(0, 1.5))


def stepping(command: Command, run: Path, chance: random.Random) -> None:
    """Anywhere in a step: forward, backward, reduction, update."""
    command.wait_until(lambda: len(list_checkpoints(run)) > 0)
    time.sleep(chance.uniform(0, 0.3))


def saving(command: Command, run: Path, chance: random.Random) -> None:
    """While a checkpoint is written or an old one is removed, both under a temporary name."""
    command.wait_until(lambda: len(list_checkpoints(run)) > 0)
    command.wait_until(lambda: any(run.glob(".tmp-checkpoint-*")))


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


@dataclass(frozen=True)
class Fault:
    """What is done at a moment, the exit codes it may give, and what then happens to a file of the last checkpoint."""

    moment: Moment
    act: Callable[[Command], None] = terminate
    codes: tuple[int, ...] = (75,)
    file: str | None = None
    harm: Callable[[Path], None] | None = None


FAULTS = {
    "SIGKILL rank 0, start": Fault(starting, kill(0), (KILLED,)),
    "SIGKILL rank 1, start": Fault(starting, kill(1), (KILLED,)),
    "SIGKILL rank 0, step": Fault(stepping, kill(0), (KILLED,)),
    "SIGKILL rank 1, step": Fault(stepping, kill(1), (KILLED,)),
    "SIGKILL rank 0, save": Fault(saving, kill(0), (KILLED,)),
    "SIGTERM, start": Fault(starting),
    "SIGTERM, step": Fault(stepping),
    "SIGTERM, save": Fault(saving),
    "truncated adapter": Fault(stepping, file=ADAPTER_MODEL, harm=truncate),
    "flipped bit in the optimizer": Fault(stepping, file=OPTIMIZER, harm=flip),
    "missing state": Fault(stepping, file=TRAINER_STATE, harm=Path.unlink),
    "flipped bit in the manifest": Fault(stepping, file=MANIFEST, harm=flip),
}


def cells() -> list[tuple[str, str, str]]:
    """(engine, method, fault): every fault under every engine, methods in turn; by default every fault once."""
    methods = list(METHODS)
    names = list(FAULTS)
    if os.environ.get("DIST_QFT_FAULTS") == "full":
        return [
            (engine, methods[(e + f) % len(methods)], name)
            for e, engine in enumerate(ENGINES)
            for f, name in enumerate(names)
        ] + [("fsdp", method, names[4]) for method in methods]
    return [(ENGINES[f % 3], methods[f % 4], name) for f, name in enumerate(names)]


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    rows: list[str] = []
    yield rows
    if path := os.environ.get("DIST_QFT_FAULT_TABLE"):
        head = "| engine | method | fault | exit code | went on from step | seconds to the end |\n"
        Path(path).write_text(head + "|---" * 6 + "|\n" + "".join(rows))


def state_of(run: Path) -> tuple[str, str, list[dict[str, float]]]:
    state = read_checkpoint(run / f"checkpoint-{STEPS}").state
    return adapter_digest(run), state.data_chain, state.history


@pytest.fixture(scope="module")
def undisturbed(tiny_llama, tmp_path_factory) -> Callable[[str, str], tuple[Path, tuple]]:
    """The config of an engine and method, and what a run of it ends with when nothing happens."""
    known: dict[tuple[str, str], tuple[Path, tuple]] = {}

    def get(engine: str, method: str) -> tuple[Path, tuple]:
        if (engine, method) not in known:
            folder = tmp_path_factory.mktemp(f"{engine}-{method}")
            train, checkpoint = {"max_steps": STEPS}, {"save_steps": 2, "save_total_limit": 3}
            sections = {"train": train, "checkpoint": checkpoint, "sharding": {"engine": engine}, **METHODS[method]}
            save_config(tiny_config(tiny_llama, folder / "run", **sections), folder / "run.yaml")
            with Command("train", folder / "run.yaml", ranks=2) as command:
                done = command.finish()
            assert done.code == 0, done.err
            known[engine, method] = folder / "run.yaml", state_of(folder / "run")
        return known[engine, method]

    return get


@pytest.mark.parametrize(("engine", "method", "name"), cells())
def test_after_a_fault_the_run_ends_as_if_there_was_none(undisturbed, table, tmp_path, engine, method, name):
    config, expected = undisturbed(engine, method)
    fault, run = FAULTS[name], tmp_path / "run"
    chance = random.Random(f"{engine} {method} {name}")
    with Command("train", config, f"output_dir={run}", ranks=2) as command:
        fault.moment(command, run, chance)
        fault.act(command)
        ended = command.finish()
    assert ended.code in fault.codes, ended.err
    assert "Traceback" not in ended.err
    saved = list_checkpoints(run)
    assert [fault_in(path) for path in saved] == [None] * len(saved), "no torn checkpoint has a checkpoint's name"
    if fault.harm is not None:
        fault.harm(saved[-1] / fault.file)
        saved = saved[:-1]

    started = time.monotonic()
    with Command("train", config, f"output_dir={run}", "--resume", "auto", ranks=2) as command:
        done = command.finish()
    assert done.code == 0, done.err
    if fault.harm is not None:
        assert f"refused: {fault.file}: " in done.err
    step = int(saved[-1].name.split("-")[1]) if saved else 0
    assert not saved or f"resuming from {saved[-1]} at step {step}" in done.err
    assert state_of(run) == expected, "the same bytes, the same samples, the same losses"
    assert not list(run.glob(".tmp-*")), "what the fault left behind is gone"
    seconds = time.monotonic() - started
    table.append(f"| {engine} | {method} | {name} | {ended.code} | {step} | {seconds:.1f} |\n")
