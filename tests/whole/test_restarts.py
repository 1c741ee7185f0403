"""The launcher starts ranks again: what for, how often, and that the run then goes on where it was."""

import signal
from pathlib import Path

import pytest

from dist_qft.config.load import save_config
from dist_qft.storage.checkpoint import list_checkpoints, read_checkpoint
from dist_qft.training.resume import resume_after_restart
from tests.support.commands import Command
from tests.support.fault_ranks import fault_ranks
from tests.support.tiny_model import tiny_config
from tests.support.whole_runs import adapter_digest, train_only

STEPS = 24
RANKS = fault_ranks()
SECTIONS = {
    "train": {"max_steps": STEPS},
    "checkpoint": {"save_steps": 4, "save_total_limit": 20},
    "sharding": RANKS.sharding(),
}


@pytest.fixture
def config(tiny_llama: Path, tmp_path: Path) -> Path:
    save_config(tiny_config(tiny_llama, tmp_path / "run", **SECTIONS), tmp_path / "run.yaml")
    return tmp_path / "run.yaml"


def digest_and_history(run: Path) -> tuple[str, str, str]:
    state = read_checkpoint(run / f"checkpoint-{STEPS}").state
    return adapter_digest(run), state.data_chain, state.history_digest


def test_a_lost_rank_restarts_the_group_which_ends_with_the_undisturbed_adapter(
    pools, tiny_llama, config, tmp_path, monkeypatch
):
    pools[RANKS.count].run(train_only, config=tiny_config(tiny_llama, tmp_path / "undisturbed", **SECTIONS))
    monkeypatch.setenv("PET_MAX_RESTARTS", "2")
    with Command("train", config, ranks=RANKS.count) as command:
        command.wait_until(lambda: len(list_checkpoints(tmp_path / "run")) > 0)
        command.rank(RANKS.last).send_signal(signal.SIGKILL)
        done = command.finish()
    assert done.code == 0, done.err
    assert f"rank {RANKS.last} was killed by SIGKILL; starting again, 1 more restarts left" in done.err
    assert "resuming from " in done.err
    assert digest_and_history(tmp_path / "run") == digest_and_history(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("env", "resume", "saved", "expected"),
    [
        ({}, None, True, None),
        ({"SLURM_RESTART_COUNT": "0"}, None, True, None),
        ({"SLURM_RESTART_COUNT": "2"}, None, True, "auto"),
        ({"SLURM_RESTART_COUNT": "2"}, "elsewhere/checkpoint-3", True, "auto"),
        ({"SLURM_RESTART_COUNT": "2"}, "elsewhere/checkpoint-3", False, "elsewhere/checkpoint-3"),
        ({"TORCHELASTIC_MAX_RESTARTS": "0"}, None, True, None),
        ({"TORCHELASTIC_MAX_RESTARTS": "3"}, None, True, "auto"),
        ({"TORCHELASTIC_MAX_RESTARTS": "3"}, None, False, None),
    ],
)
def test_what_resume_means_in_a_restart(tmp_path, env, resume, saved, expected):
    if saved:
        (tmp_path / "checkpoint-5").mkdir()
    assert resume_after_restart(tmp_path, resume, env) == expected
