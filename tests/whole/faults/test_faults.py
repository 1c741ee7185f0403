"""Real faults in real runs: what the shell sees, what is left, and that the run goes on as if nothing was.

Starting a run costs seconds, so several faults strike the same run one after the other, before it ends undisturbed.
Two such runs by default, one for each engine that shards, the first with two bases of two ranks each; every fault under
every engine with DIST_QFT_FAULTS=full, and with two bases under the engines that shard with DIST_QFT_TEST_GROUP=2, too.
The outcomes are written as a Markdown table to DIST_QFT_FAULT_TABLE. Moments are random in their phase, from a seed
that engine, method and fault give.
"""

import json
import os
import random
import shutil
import signal
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
from dist_qft.training.metrics_file import METRICS_FILE
from tests.support.commands import Command, Finished
from tests.support.fault_ranks import GROUP, FaultRanks, fault_ranks
from tests.support.faults import (
    FULL_DISK,
    MERGED,
    NO_MOUNTS,
    READ_ONLY,
    Moment,
    by_itself,
    flip,
    kill_first,
    kill_last,
    merging,
    nothing,
    on_disk,
    pruning,
    saving,
    starting,
    stepping,
    terminate,
    terminate_last,
    truncate,
)
from tests.support.qst_models import qst_config
from tests.support.tiny_model import tiny_config
from tests.support.whole_runs import adapter_digest, train

STEPS = 24
KILLED = 128 + signal.SIGKILL
NF4 = {"quantization": {"linear": "nf4", "block": [64]}}
METHODS = {
    "qahira": {},
    "qlora": {**NF4, "method": {"name": "qlora", "rank": 4}},
    "qbara": {**NF4, "method": {"name": "qbara", "rank": 4, "balance": 2}},
    "qalora": {"method": {"name": "qalora", "rank": 4, "pool": 4}},
    "qst": {},
}
ENGINES = ("fsdp", "zero", "replicated")


@dataclass(frozen=True)
class Fault:
    """An action at a moment, the exit codes it may give, and a change of a file of the last checkpoint.

    Attributes:
        said: part of what the command says of it, LAST for the number of the last rank.
        settings: of the run beside the cell's.
        disk: the script that the run is started by, on a disk of its own.
    """

    moment: Moment
    act: Callable[[Command], None] = terminate
    codes: tuple[int, ...] = (75,)
    said: str = ""
    file: str | None = None
    harm: Callable[[Path], None] | None = None
    settings: tuple[str, ...] = ()
    disk: str | None = None


SAVED = "error: stopped by a signal after step "
EVALUATES = ("evaluation.eval_steps=2",)  # which takes longer than the two steps in between
MERGES = ("merge.at_end=dense",)


FAULTS = {
    "SIGKILL rank 0, start": Fault(starting, kill_first, (KILLED,)),
    "SIGKILL last rank, start": Fault(starting, kill_last, (KILLED,)),
    "SIGKILL rank 0, step": Fault(stepping, kill_first, (KILLED,)),
    "SIGKILL last rank, step": Fault(stepping, kill_last, (KILLED,), "rank LAST is gone"),
    "SIGKILL rank 0, save": Fault(saving, kill_first, (KILLED,)),
    "SIGTERM, start": Fault(starting),
    "SIGTERM, step": Fault(stepping, said=SAVED),
    "SIGTERM last rank, step": Fault(stepping, terminate_last, said=SAVED),
    "SIGTERM, save": Fault(saving, said=SAVED),
    "SIGKILL rank 0, prune": Fault(pruning, kill_first, (KILLED,)),
    "SIGKILL last rank, evaluation": Fault(stepping, kill_last, (KILLED,), settings=EVALUATES),
    "SIGTERM, evaluation": Fault(stepping, said=SAVED, settings=EVALUATES),
    "SIGKILL rank 0, merge": Fault(merging, kill_first, (KILLED,), settings=MERGES),
    "SIGTERM, merge": Fault(merging, codes=(75, 0), settings=MERGES),  # 0: it came after the last layer
    "disk full": Fault(by_itself, nothing, (3,), disk=FULL_DISK),
    "output read-only": Fault(by_itself, nothing, (3,), disk=READ_ONLY),
    "truncated adapter": Fault(stepping, terminate_last, said=SAVED, file=ADAPTER_MODEL, harm=truncate),
    "flipped bit in the optimizer": Fault(stepping, file=OPTIMIZER, harm=flip),
    "missing state": Fault(stepping, file=TRAINER_STATE, harm=Path.unlink),
    "flipped bit in the manifest": Fault(stepping, file=MANIFEST, harm=flip),
}

# What strikes one run in turn. Faults of a run that has no folder yet come first, and only there: a rank that is killed
# at the start has not said from where it goes on. Those of the merge come last.
SERIES = (
    ("disk full", "SIGKILL rank 0, save", "truncated adapter"),
    ("SIGKILL last rank, step", "SIGTERM, evaluation", "SIGTERM, merge"),
    ("output read-only", "SIGKILL rank 0, prune"),
    ("SIGKILL last rank, start", "SIGTERM, step", "flipped bit in the optimizer", "SIGKILL rank 0, merge"),
    ("SIGTERM, start", "SIGKILL rank 0, step", "SIGTERM, save", "missing state"),
    (
        "SIGKILL rank 0, start",
        "SIGKILL last rank, evaluation",
        "SIGTERM last rank, step",
        "flipped bit in the manifest",
    ),
)


def cases() -> list[tuple[str, str, FaultRanks, tuple[str, ...]]]:
    """(engine, method, ranks, faults): every series under every engine, methods in turn; by default two of them."""
    every = []
    for s, names in enumerate(SERIES):
        merges = any(FAULTS[name].settings == MERGES for name in names)
        methods = [method for method in METHODS if not (merges and method == "qst")]
        every += [(engine, methods[(e + s) % len(methods)], fault_ranks(), names) for e, engine in enumerate(ENGINES)]
    if os.environ.get("DIST_QFT_FAULTS") == "full":
        # An engine that does not shard has no groups.
        return [case for case in every if GROUP is None or case[0] != "replicated"]
    (engine, method, _, names), second = every[0], every[4]
    return [(engine, method, fault_ranks(group=2), names), second]


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    rows: list[str] = []
    yield rows
    if path := os.environ.get("DIST_QFT_FAULT_TABLE"):
        head = "| engine | method | ranks | group | fault | exit code | went on from step |\n"
        Path(path).write_text(head + "|---" * 7 + "|\n" + "".join(rows))


def state_of(run: Path) -> tuple[str, str, str]:
    state = read_checkpoint(run / f"checkpoint-{STEPS}").state
    return adapter_digest(run), state.data_chain, state.history_digest


def train_undisturbed(config):
    train(config)
    return state_of(Path(config.output_dir))


@pytest.fixture(scope="module")
def undisturbed(pools, tiny_llama, tmp_path_factory) -> Callable[[str, str, FaultRanks], tuple[Path, tuple]]:
    """The config of an engine, method and ranks, and what a run of it ends with when nothing happens."""
    known: dict[tuple[str, str, FaultRanks], tuple[Path, tuple]] = {}

    def get(engine: str, method: str, ranks: FaultRanks) -> tuple[Path, tuple]:
        if (engine, method, ranks) not in known:
            folder = tmp_path_factory.mktemp(f"{engine}-{method}")
            sections = {
                "train": {"max_steps": STEPS},
                "checkpoint": {"save_steps": 2, "save_total_limit": 3},
                "data": {"eval_samples": 20},
                "sharding": ranks.sharding(engine=engine),
            }
            make_config = qst_config if method == "qst" else tiny_config
            config = make_config(tiny_llama, folder / "run", **sections, **METHODS[method])
            save_config(config, folder / "run.yaml")
            ended = pools[ranks.count].run(train_undisturbed, config=config)[0]
            known[engine, method, ranks] = folder / "run.yaml", ended
        return known[engine, method, ranks]

    return get


@pytest.mark.parametrize(
    ("engine", "method", "ranks", "names"), cases(), ids=lambda part: part if isinstance(part, str) else ""
)
def test_after_faults_the_run_ends_as_if_there_were_none(undisturbed, table, tmp_path, engine, method, ranks, names):
    config, expected = undisturbed(engine, method, ranks)
    run = tmp_path / "run"
    settings = {word for name in names for word in FAULTS[name].settings}
    words = ("train", config, f"output_dir={run}", *sorted(settings), "--resume", "auto")
    step, told = 0, []  # what the next start goes on from, and says
    for name in names:
        fault, chance = FAULTS[name], random.Random(f"{engine} {method} {name}")
        with Command(*words, ranks=ranks.count, wrapper=on_disk(fault.disk, run, config.parent / "run")) as command:
            fault.moment(command, run, chance)
            fault.act(command)
            ended = command.finish()
        if fault.disk is not None:
            if ended.code == NO_MOUNTS:
                pytest.skip(f"no private mounts here: {ended.err.strip()}")
            run.rmdir()
            shutil.move(f"{run}.left", run)
            assert ended.err.count("error: rank 0: ") == 1, "the rank that writes says why, once"
        assert ended.code in fault.codes, ended.err
        assert fault.said.replace("LAST", str(ranks.last)) in ended.err and "Traceback" not in ended.err, ended.err
        assert [part for part in told if part not in ended.err] == [], ended.err
        require_steps_once(ended, step)
        saved = list_checkpoints(run)
        assert [fault_in(path) for path in saved] == [None] * len(saved), "no torn checkpoint has a checkpoint's name"
        told = []
        if fault.harm is not None:
            fault.harm(saved[-1] / fault.file)
            # A manifest that is wrong speaks of another file.
            told = [f"refused: {'' if fault.file == MANIFEST else fault.file + ': '}"]
            saved = saved[:-1]
        step = int(saved[-1].name.split("-")[1]) if saved else 0
        if 0 < step < STEPS:
            told.append(f"resuming from {saved[-1]} at step {step}")
        table.append(
            f"| {engine} | {method} | {ranks.count} | {ranks.group or 'world'} | {name} | {ended.code} | {step} |\n"
        )

    with Command(*words, ranks=ranks.count) as command:
        done = command.finish()
    assert done.code == 0, done.err
    assert [part for part in told if part not in done.err] == [], done.err
    require_steps_once(done, step)
    assert state_of(run) == expected, "the same bytes, the same samples, the same losses"
    assert not list(run.glob(".tmp-*")), "what the faults left behind is gone"
    metrics = [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]
    assert [record["step"] for record in metrics if "train/loss" in record] == list(range(1, STEPS + 1))
    assert [record["step"] for record in metrics if "base/loss" in record] == [0], "the base is evaluated once"
    if set(MERGES) <= settings:
        assert (run / MERGED / "certificate.json").is_file()


def require_steps_once(ended: Finished, first: int) -> None:
    """It told each step after `first` once, and if it was stopped it saved the last of them."""
    lines = ended.err.splitlines()
    steps = [int(line.split("/")[0].removeprefix("step ")) for line in lines if line.startswith("step ")]
    assert steps == list(range(first + 1, first + 1 + len(steps))), ended.err
    stopped = [line for line in lines if line.startswith(SAVED)]
    if stopped:
        assert stopped == [f"{SAVED}{steps[-1]}, which is saved; continue with --resume auto"]
