"""Kills and signals through the real launcher, at times of chance, in a run of several ranks with a merge at its end.

A chain is one run that is started, struck and started again until it ends by itself. It must then have the bytes of a
run that nothing happened to: adapter, optimizer, merged weights, and each step once in `metrics.jsonl`. After each
strike every process of the run is gone in time, and nothing half written is left at the end.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from dist_qft.storage.checkpoint import ADAPTER_MODEL, OPTIMIZER, fault_in, list_checkpoints
from tests.support.commands import Command, is_rank
from tests.support.fault_ranks import fault_ranks
from tests.whole.breaking.attempts import Breaker, Budget, Tally
from tests.whole.breaking.workshop import Workshop

STEPS = 24
_RANKS = fault_ranks()
_STRIKES = 4  # in a chain, at most
_GONE_SECONDS = 45.0  # until no process of a struck run is left
_END_SECONDS = 150.0
_MERGED = "merged-dense"
_SAVED_CODES = (75, 143)  # stopped after a step, or before the run had begun


def killer(shop: Workshop) -> Breaker:
    """Chains; each strike counts as an attempt, and a start that has ended before its strike does not."""

    def attempt_all(budget: Budget) -> Tally:
        tally = Tally("kill or signal through the launcher")
        config = _config(shop, shop.folder / "reference")
        if not (reference := shop.folder / "reference" / "run").exists():
            with Command("train", config, ranks=_RANKS.count) as command:
                ended = command.finish()
            assert ended.code == 0, ended.err
        expected = _bytes_of(reference)
        for number, chance in budget.each():
            if tally.tried >= budget.attempts:
                break
            _chain(shop, f"{budget.seed}:{number}", chance, expected, tally)
        return tally

    return attempt_all


def _config(shop: Workshop, place: Path) -> Path:
    """The workshop's config for a run in `place` on several ranks, whose steps leave time to strike."""
    place.mkdir(parents=True, exist_ok=True)
    tree = shop.tree()
    tree["output_dir"] = str(place / "run")
    tree["train"] |= {"max_steps": STEPS, "global_batch_size": 2 * _RANKS.count}
    tree["sharding"] |= _RANKS.sharding(engine="fsdp", timeout_seconds=30)
    path = place / "run.yaml"
    path.write_text(json.dumps(tree))
    return path


def _chain(shop: Workshop, name: str, chance: random.Random, expected: object, tally: Tally) -> None:
    place = shop.folder / "chain"
    shutil.rmtree(place, ignore_errors=True)
    config, run = _config(shop, place), place / "run"
    strikes = chance.randint(1, _STRIKES)
    for start in range(strikes + 1):
        with Command("train", config, "--resume", "auto", ranks=_RANKS.count) as command:
            if start < strikes:
                _strike(command, run, chance, f"{name}, start {start}", tally)
            else:
                ended = command.finish()
                if ended.code != 0:
                    tally.fail(name, f"the last start ended with {ended.code}: {ended.err.strip()[-300:]}")
                    return
        if torn := [path.name for path in list_checkpoints(run) if fault_in(path)]:
            tally.fail(name, f"torn: {torn}")
    if _bytes_of(run) != expected:
        tally.fail(name, "other bytes than the undisturbed run")
    if left := [path.name for path in run.rglob("*") if path.name.startswith(".tmp-")]:
        tally.fail(name, f"left over: {left}")


def _strike(command: Command, run: Path, chance: random.Random, name: str, tally: Tally) -> None:
    """Wait for a moment of chance, strike, and see that the run ends as it should; nothing if it has ended before."""
    moment, kind = chance.choice(list(_MOMENTS)), chance.choice(list(_STRIKES_BY_NAME))
    if not _MOMENTS[moment](command, run, chance):
        return
    family = [*psutil.Process(command.process.pid).children(recursive=True), psutil.Process(command.process.pid)]
    kills = _STRIKES_BY_NAME[kind](command, family, chance)
    try:
        code = command.process.wait(_END_SECONDS)
    except Exception:
        tally.fail(name, f"{kind}, {moment}: the launcher did not end in {_END_SECONDS:.0f} s")
        code = -1
    _, alive = psutil.wait_procs(family, timeout=_GONE_SECONDS)
    if alive:
        tally.fail(name, f"{kind}, {moment}: {len(alive)} processes are left")
    error = _tail(command)
    if "Traceback (most recent call last)" in error:
        tally.fail(name, f"{kind}, {moment}: traceback: {error.strip()[-300:]}")
    if not kills and code not in (*_SAVED_CODES, 0, 130):
        tally.fail(name, f"{kind}, {moment}: code {code}: {error.strip()[-200:]}")
    tally.outcomes[f"{kind}, {moment}"] += 1


def _tail(command: Command) -> str:
    try:
        return command.process.communicate(timeout=5)[1] or ""
    except Exception:  # some process that is left holds the pipe
        return ""


def _until(command: Command, condition: Callable[[], bool]) -> bool:
    """Wait until something is so; False if the command ends first."""
    while command.process.poll() is None:
        if condition():
            return True
        time.sleep(0.005)
    return False


def _any_time(command: Command, run: Path, chance: random.Random) -> bool:
    after = time.monotonic() + chance.uniform(0.2, 10)
    return _until(command, lambda: time.monotonic() > after)


def _in_steps(command: Command, run: Path, chance: random.Random) -> bool:
    before = len(list_checkpoints(run))
    found = _until(command, lambda: len(list_checkpoints(run)) > before)
    time.sleep(chance.uniform(0, 0.4))
    return found


def _in_a_save(command: Command, run: Path, chance: random.Random) -> bool:
    return _until(command, lambda: any(run.glob(".tmp-checkpoint-*")))


def _in_the_merge(command: Command, run: Path, chance: random.Random) -> bool:
    found = _until(command, lambda: any(run.glob(f".tmp-{_MERGED}-*")))
    time.sleep(chance.uniform(0, 0.1))
    return found


_MOMENTS = {"any time": _any_time, "steps": _in_steps, "a save": _in_a_save, "the merge": _in_the_merge}


def _kill_rank(command: Command, family: list[psutil.Process], chance: random.Random) -> bool:
    ranks = [process for process in family if _is_rank(process)]
    (chance.choice(ranks) if ranks else family[-1]).kill()
    return True


def _kill_launcher(command: Command, family: list[psutil.Process], chance: random.Random) -> bool:
    command.process.kill()
    return True


def _twice(number: signal.Signals, apart: float) -> Callable[[Command, list[psutil.Process], random.Random], bool]:
    def act(command: Command, family: list[psutil.Process], chance: random.Random) -> bool:
        for _ in range(2):
            if command.process.poll() is None:
                os.kill(command.process.pid, number)
                time.sleep(chance.uniform(0, apart))
        return False

    return act


_STRIKES_BY_NAME = {
    "SIGKILL of a rank": _kill_rank,
    "SIGKILL of the launcher": _kill_launcher,
    "SIGTERM twice": _twice(signal.SIGTERM, 0.3),
    "SIGINT twice": _twice(signal.SIGINT, 1.0),
}


def _is_rank(process: psutil.Process) -> bool:
    try:
        return is_rank(process)
    except psutil.Error:
        return False


def _bytes_of(run: Path) -> object:
    """The results that two runs must share: trained and merged bytes, and the step of every loss."""
    files = [run / f"checkpoint-{STEPS}" / ADAPTER_MODEL, run / f"checkpoint-{STEPS}" / OPTIMIZER]
    files += sorted((run / _MERGED).glob("*.safetensors"))
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None for file in files]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return digests, [(record["step"], record["train/loss"]) for record in records if "train/loss" in record]
