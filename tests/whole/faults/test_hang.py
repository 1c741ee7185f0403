"""A rank that stops answering: all others name it, leave a report, and nothing is left running."""

import signal
import time
from pathlib import Path

import psutil

from dist_qft.config.load import save_config
from dist_qft.ranks.crash import CRASH_FOLDER
from dist_qft.storage.checkpoint import fault_in, list_checkpoints
from tests.support.commands import Command
from tests.support.fault_ranks import GROUP, fault_ranks
from tests.support.tiny_model import tiny_config

SPREAD = fault_ranks(group=GROUP or 2)  # ranks 2 and 3 share another base, and wait elsewhere than rank 0
RANKS, STOPPED, TIMEOUT_SECONDS = SPREAD.count, 1, 20


def test_a_stopped_rank_is_named_by_all_others_and_nothing_is_left(tiny_llama: Path, tmp_path: Path):
    run = tmp_path / "run"
    sections = {"train": {"max_steps": 5000, "global_batch_size": 2 * RANKS}, "checkpoint": {"save_steps": 2}}
    config = tiny_config(tiny_llama, run, sharding=SPREAD.sharding(timeout_seconds=TIMEOUT_SECONDS), **sections)
    save_config(config, tmp_path / "run.yaml")
    with Command("train", tmp_path / "run.yaml", ranks=RANKS) as command:
        command.wait_until(lambda: len(list_checkpoints(run)) > 0)
        processes = [command.rank(rank) for rank in range(RANKS)]
        processes[STOPPED].send_signal(signal.SIGSTOP)
        started = time.monotonic()
        failed = command.finish()
        seconds = time.monotonic() - started
    assert failed.code == 4, failed.err
    told = [line for line in failed.err.splitlines() if line.startswith("error: rank ")]
    others = [rank for rank in range(RANKS) if rank != STOPPED]
    for rank in others:
        mine = [line for line in told if line.startswith(f"error: rank {rank}: step ")]
        assert len(mine) == 1 and f": rank {STOPPED} does not answer, last heard of at " in mine[0], failed.err
        report = (run / CRASH_FOLDER / f"rank-{rank}.txt").read_text()
        assert f"rank {rank} of {RANKS}, at step " in report
        for part in (
            "error: PeerLostError: step",
            "last collective: ",
            " MiB at most",
            "training_run.py",
            "all threads:",
        ):
            assert part in report, report
    assert psutil.wait_procs(processes, timeout=5)[1] == [], "no orphans"
    assert all(fault_in(path) is None for path in list_checkpoints(run))
    assert seconds < 3 * TIMEOUT_SECONDS, "the ranks decide, not the patience of the launcher"
