"""Resuming: byte for byte the run it would have been, on any number of ranks and any engine; or refused."""

import hashlib
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from dist_qft.config.schema import RunConfig
from dist_qft.errors import UserError
from dist_qft.ranks.world import World
from dist_qft.storage.checkpoint import ADAPTER_MODEL, list_checkpoints, read_checkpoint
from dist_qft.train import gather_inputs
from dist_qft.training.event_files import EVENTS_FOLDER
from dist_qft.training.metrics_file import METRICS_FILE
from dist_qft.training.summary import SUMMARY_FILE
from dist_qft.training.training_run import TrainingRun
from tests.support.outcomes import Outcome, attempt
from tests.support.tiny_model import save_tiny_model, tiny_config, tiny_llama_config, write_data
from tests.support.whole_runs import adapter_digest

STEPS = 20  # of 8 samples; the data has 60, so epochs end within steps 8 and 15


def until(config: RunConfig, step: int) -> RunConfig:
    """The same run with its end at `step`."""
    return config.model_copy(update={"train": config.train.model_copy(update={"max_steps": step})})


def run_to(pool, config: RunConfig, step: int, resume: str | None = "auto") -> Outcome:
    outcomes = pool.run(attempt, config=until(config, step), resume=resume)
    assert {outcome.error for outcome in outcomes} == {""}
    assert all(outcome == outcomes[0] for outcome in outcomes), "ranks disagree"
    return outcomes[0]


def files_in(folder: Path) -> dict[str, str]:
    """Every file below a folder and its SHA-256."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def undisturbed(pools, tiny_llama, tmp_path_factory) -> tuple[Outcome, str]:
    """Outcome and adapter digest of 20 steps on two ranks without a stop."""
    config = tiny_config(tiny_llama, tmp_path_factory.mktemp("undisturbed") / "run")
    return run_to(pools[2], config, STEPS, resume=None), adapter_digest(config.output_dir)


@pytest.fixture(scope="module")
def stopped(pools, tiny_llama, tmp_path_factory) -> RunConfig:
    """A run on one rank with checkpoints of steps 2 and 4, its last; not to be changed."""
    folder = tmp_path_factory.mktemp("stopped")
    config = tiny_config(tiny_llama, folder / "run", checkpoint={"save_steps": 2})
    run_to(pools[1], config, 4, resume=None)
    return config


@pytest.fixture
def run_dir(stopped, tmp_path) -> Path:
    """A copy of the stopped run's folder."""
    return Path(shutil.copytree(stopped.output_dir, tmp_path / "run"))


def test_stops_anywhere_change_no_byte(pools, tiny_llama, tmp_path, undisturbed):
    config = tiny_config(tiny_llama, tmp_path / "run")
    for step in (3, 8, 10, 15, STEPS):  # within an epoch, at the steps where epochs end, and halfway
        outcome = run_to(pools[2], config, step)
    assert (outcome, adapter_digest(config.output_dir)) == undisturbed


def test_any_number_of_ranks_and_any_engine_continue_with_the_same_samples(pools, tiny_llama, tmp_path, undisturbed):
    config = tiny_config(tiny_llama, tmp_path / "run")
    for step, ranks, engine in [(5, 4, "fsdp"), (9, 1, "replicated"), (14, 2, "replicated"), (STEPS, 4, "fsdp")]:
        group = 2 if ranks == 4 else "world"  # on four ranks the base is there twice
        sharding = config.sharding.model_copy(update={"engine": engine, "group": group})
        train = config.train.model_copy(update={"shard_optimizer": ranks == 4})
        outcome = run_to(pools[ranks], config.model_copy(update={"sharding": sharding, "train": train}), step)
    assert outcome.data_chain == undisturbed[0].data_chain
    assert outcome.losses == pytest.approx(undisturbed[0].losses, rel=1e-4)


def test_a_torn_newest_checkpoint_costs_its_steps_and_nothing_else(pools, tiny_llama, tmp_path, undisturbed):
    config = tiny_config(tiny_llama, tmp_path / "run", checkpoint={"save_steps": 4})
    run_to(pools[2], config, 12, resume=None)
    newest = list_checkpoints(tmp_path / "run")[-1]
    size = (newest / ADAPTER_MODEL).stat().st_size
    os.truncate(newest / ADAPTER_MODEL, size - 1)
    outcome = run_to(pools[2], config, STEPS)
    assert (outcome, adapter_digest(config.output_dir)) == undisturbed
    assert [line for line in outcome.told.splitlines() if "refused" in line] == [
        f"{newest}: refused: {ADAPTER_MODEL}: {size - 1} bytes, the manifest says {size}"
    ]
    assert f"resuming from {tmp_path / 'run' / 'checkpoint-8'} at step 8" in outcome.told


def signal_rank_1(run: TrainingRun) -> None:
    """SIGTERM reaches rank 1 in the middle of its seventh backward pass."""
    _, parameter = run.parts.trainables.named_tensors()[0]

    def strike(_: torch.Tensor) -> None:
        if run.world.rank == 1 and run.state.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    parameter.register_hook(strike)


def test_a_signal_to_one_rank_stops_all_at_the_same_saved_step(pools, tiny_llama, tmp_path, undisturbed):
    config = tiny_config(tiny_llama, tmp_path / "run")
    outcomes = pools[2].run(attempt, config=until(config, STEPS), disturb=signal_rank_1)
    message = "stopped by a signal after step 7, which is saved; continue with --resume auto"
    assert outcomes == [Outcome(message, 75, told_once=True)] * 2
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-7"]
    assert (run_to(pools[2], config, STEPS), adapter_digest(config.output_dir)) == undisturbed


def refusal(config: RunConfig, resume: str | None) -> str:
    """The refusal of a run on one rank, before a process group exists; asserts that nothing was touched."""
    output_dir = Path(config.output_dir)
    before = files_in(output_dir)
    with pytest.raises(UserError) as error:
        gather_inputs(config, resume, World.from_environment({}), torch.device("cpu"))
    assert files_in(output_dir) == before
    assert error.value.exit_code == 2
    return str(error.value)


def changed(config: RunConfig, run_dir: Path, section: str, **changes: object) -> RunConfig:
    tree = config.model_dump(exclude_unset=True)
    tree[section] = {**tree[section], **changes}
    return RunConfig.model_validate({**tree, "output_dir": str(run_dir)})


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("train", {"seed": 1}, "train.seed was 0, the config says 1"),
        ("train", {"global_batch_size": 4}, "train.global_batch_size was 8, the config says 4"),
        ("train", {"max_steps": 3}, "is at step 4, beyond the 3 steps that train.max_steps asks for"),
        ("data", {"max_length": 12}, "(another file, tokenizer, template or data setting)"),
        ("method", {"alpha": 8.0}, "alpha was 16.0, the config says 8.0"),
        ("method", {"name": "qlora", "pool": None, "repeat": None}, "pool was 4, the config says 1; repeat was 8"),
        ("method", {"targets": ["q_proj"]}, "mlp.down_proj: in_features was 128, the config says absent"),
    ],
)
def test_another_run_is_not_continued(stopped, run_dir, section, changes, message):
    found = refusal(changed(stopped, run_dir, section, **changes), "auto")
    assert found.startswith(f"{run_dir / 'checkpoint-4'}: ")
    assert message in found


def test_other_data_is_not_continued_and_both_digests_are_shown(stopped, run_dir, tmp_path):
    other = write_data(tmp_path / "other.jsonl", count=59)
    config = changed(stopped, run_dir, "data", train={"path": str(other)})
    trained_on = read_checkpoint(run_dir / "checkpoint-4").state.data_digest
    assert f"trained on data {trained_on[:16]}..., data.train is now " in refusal(config, "auto")


def test_another_base_is_refused_and_both_fingerprints_are_shown(pools, stopped, run_dir, tmp_path):
    other = save_tiny_model(tmp_path / "other", tiny_llama_config(initializer_range=0.2))
    before = files_in(run_dir)
    config = changed(stopped, run_dir, "model", path=str(other))
    outcomes = pools[2].run(attempt, config=until(config, 6), resume="auto")
    assert files_in(run_dir) == before
    assert outcomes[0] == outcomes[1] and outcomes[0].exit_code == 2 and outcomes[0].told_once
    trained_on = read_checkpoint(run_dir / "checkpoint-4").adapter_config["base_fingerprint"]
    assert f"{run_dir / 'checkpoint-4'}: trained on base {trained_on[:16]}..., this base is " in outcomes[0].error
    assert outcomes[0].error.count(trained_on[:16]) == 1


def test_a_run_does_not_mix_its_checkpoints_with_others(stopped, run_dir, tmp_path):
    config = changed(stopped, run_dir, "train", max_steps=8)
    held = f"output_dir: '{run_dir}' already holds checkpoint-4"
    remedy = "; continue with --resume auto, or choose another folder"
    assert refusal(config, None) == held + remedy
    chosen = run_dir / "checkpoint-2"
    assert refusal(config, str(chosen)) == f"{held}, not only '{chosen}'{remedy}"
    elsewhere = Path(stopped.output_dir) / "checkpoint-4"
    assert refusal(config, str(elsewhere)) == f"{held}, not only '{elsewhere}'{remedy}"
    empty = changed(stopped, tmp_path / "new", "train", max_steps=8)
    assert gather_inputs(empty, str(elsewhere), World.from_environment({}), torch.device("cpu")).checkpoint


def test_a_run_that_ended_within_a_batch_cannot_be_extended(pools, tiny_llama, tmp_path):
    config = tiny_config(tiny_llama, tmp_path / "run", train={"max_steps": None, "num_train_epochs": 0.2})
    outcome = pools[1].run(attempt, config=config)[0]
    assert len(outcome.history) == 2, "12 samples in batches of 8"
    longer = changed(config, tmp_path / "run", "train", num_train_epochs=0.5)
    assert "ended with an incomplete batch, after 12 rows in 2 steps of 8" in refusal(longer, "auto")


def test_a_fraction_of_an_epoch_has_the_rows_that_are_written(tiny_llama, tmp_path):
    write_data(tmp_path / "data.jsonl", count=100)
    config = tiny_config(tiny_llama, tmp_path / "run", train={"max_steps": None, "num_train_epochs": 1.1})
    inputs = gather_inputs(config, None, World.from_environment({}), torch.device("cpu"))
    assert inputs.length() == (14, 110), "100 * 1.1 is above 110 in floating point"


def test_a_run_in_epochs_that_is_too_short_for_early_stopping_says_so(tiny_llama, tmp_path):
    sections = {"train": {"max_steps": None, "num_train_epochs": 1}, "data": {"eval_samples": 4}}
    evaluation = {"eval_steps": 4, "early_stopping_patience": 1}
    config = tiny_config(tiny_llama, tmp_path / "run", **sections, evaluation=evaluation)
    inputs = gather_inputs(config, None, World.from_environment({}), torch.device("cpu"))
    assert [note for note in inputs.notes if note.startswith("warning: evaluation.")] == [
        "warning: evaluation.early_stopping_patience: no effect in a run of 7 steps, which could stop at step 8 at the "
        "earliest (1 + 1 evaluations, one every 4)"
    ]


def test_a_changed_learning_rate_is_allowed_and_said(pools, stopped, run_dir):
    config = changed(stopped, run_dir, "train", max_steps=6, learning_rate=1e-3)
    notes = gather_inputs(config, "auto", World.from_environment({}), torch.device("cpu")).notes
    assert notes == [
        "train.max_steps was 4 until step 4, it is now 6",
        "train.learning_rate was 0.005 until step 4, it is now 0.001",
    ]
    assert [entry.learning_rate for entry in run_to(pools[1], config, 6).history] == [5e-3] * 4 + [1e-3] * 2


def test_resume_auto_with_nothing_there_starts_and_says_so(stopped, tmp_path):
    config = changed(stopped, tmp_path / "new", "train", max_steps=6)
    inputs = gather_inputs(config, "auto", World.from_environment({}), torch.device("cpu"))
    assert inputs.checkpoint is None
    assert inputs.notes == [f"no checkpoint in '{tmp_path / 'new'}' yet: starting from the beginning"]


def test_a_finished_run_is_left_as_it_is(pools, stopped, run_dir):
    config = changed(stopped, run_dir, "train", max_steps=4)
    before = files_in(run_dir)
    outcomes = pools[2].run(attempt, config=config, resume="auto")
    assert outcomes == [Outcome(), Outcome()]
    told = f"{run_dir / 'checkpoint-4'} is the last step of this run: nothing to do\n"
    assert [outcome.told for outcome in outcomes] == [told, ""]
    assert files_in(run_dir) == before


def test_a_run_killed_after_its_last_step_is_finished(pools, stopped, run_dir):
    config = changed(stopped, run_dir, "train", max_steps=4)
    (run_dir / SUMMARY_FILE).unlink()
    run_to(pools[1], config, 4)
    assert (run_dir / SUMMARY_FILE).is_file()
    assert len(list((run_dir / EVENTS_FOLDER).iterdir())) == 1, "it goes on in the same event folder"


def test_the_summary_of_an_earlier_run_does_not_finish_a_later_one(pools, stopped, run_dir):
    """It has as many steps, and the later run was killed before its last evaluation."""
    config = changed(stopped, run_dir, "train", max_steps=4)
    summary = json.loads((run_dir / SUMMARY_FILE).read_text())
    assert summary["run_id"] == read_checkpoint(run_dir / "checkpoint-4").state.run_id
    (run_dir / SUMMARY_FILE).write_text(json.dumps({**summary, "run_id": "earlier"}))
    run_to(pools[1], config, 4)
    assert json.loads((run_dir / SUMMARY_FILE).read_text())["run_id"] == summary["run_id"]


def test_a_new_run_removes_the_summary_that_it_finds(pools, stopped, run_dir):
    for path in list_checkpoints(run_dir):
        shutil.rmtree(path)
    config = changed(stopped, run_dir, "train", max_steps=1, learning_rate=1e39)  # with which it fails
    assert pools[1].run(attempt, config=config)[0].exit_code == 6
    assert not (run_dir / SUMMARY_FILE).exists()


def test_leftovers_of_a_killed_save_are_gone_after_the_next_start_and_a_lost_history_is_told(pools, stopped, run_dir):
    shutil.copytree(run_dir / "checkpoint-4", run_dir / ".tmp-checkpoint-6-0123abcd")
    (run_dir / METRICS_FILE).unlink()
    outcome = run_to(pools[1], changed(stopped, run_dir, "train", max_steps=5), 5)
    assert not list(run_dir.glob(".tmp-*"))
    assert f"{METRICS_FILE} is not there" in outcome.told
    history = (run_dir / METRICS_FILE).read_bytes()
    state = read_checkpoint(run_dir / "checkpoint-5").state
    assert state.metrics_digest == hashlib.sha256(history[: state.metrics_bytes]).hexdigest()
