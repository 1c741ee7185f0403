"""The best evaluation's checkpoint, early stopping, and resuming with other terms of comparison."""

import json
from pathlib import Path

import pytest

from dist_qft.config.schema import EvaluationConfig, RunConfig
from dist_qft.storage.checkpoint import list_checkpoints, read_checkpoint
from dist_qft.training.metrics_file import METRICS_FILE
from dist_qft.training.summary import SUMMARY_FILE
from tests.support.outcomes import attempt
from tests.support.tiny_model import tiny_config, write_data


def steps_in_summary(run_dir: Path) -> int:
    return json.loads((run_dir / SUMMARY_FILE).read_text())["steps"]


def test_keep_best_keeps_the_checkpoint_of_the_lowest_held_out_loss_beside_the_newest(pools, tiny_llama, tmp_path):
    """Two rows that are learned by heart: the held-out loss rises soon. A save every step, two kept."""
    few, held_out = write_data(tmp_path / "few.jsonl", 2), write_data(tmp_path / "held_out.jsonl", 12)
    config = tiny_config(
        tiny_llama,
        tmp_path / "run",
        train={"max_steps": 8, "learning_rate": 0.03, "max_grad_norm": None, "lr_scheduler_type": "constant"},
        checkpoint={"save_steps": 1, "save_total_limit": 2, "keep_best": True},
        evaluation={"eval_steps": 1},
        data={"train": {"path": str(few)}, "eval": {"path": str(held_out)}},
    )
    assert [outcome.error for outcome in pools[2].run(attempt, config=config)] == ["", ""]
    metrics = [json.loads(line) for line in (tmp_path / "run" / METRICS_FILE).read_text().splitlines()]
    losses = {record["step"]: record["eval/loss"] for record in metrics if "eval/loss" in record}
    state = read_checkpoint(tmp_path / "run" / "checkpoint-8").state
    seen = {step: loss for step, loss in losses.items() if step < 8}  # the last one comes after the last save
    assert (state.best_step, state.best_loss) == (min(seen, key=seen.get), min(seen.values()))
    assert state.best_step < 7, "or the newest would be the best as well"
    names = {path.name for path in list_checkpoints(tmp_path / "run")}
    assert names == {f"checkpoint-{state.best_step}", "checkpoint-7", "checkpoint-8"}


def overfitted(model: Path, folder: Path, **checkpoint: object) -> RunConfig:
    """Two rows that are learned by heart: the held-out loss rises soon."""
    few, held_out = write_data(folder / "few.jsonl", 2), write_data(folder / "held_out.jsonl", 12)
    return tiny_config(
        model,
        folder / "run",
        method={"name": "qlora", "rank": 4, "pool": None, "repeat": None},
        quantization={"linear": "nf4", "block": [64]},
        train={"max_steps": 8, "learning_rate": 0.03, "max_grad_norm": None, "lr_scheduler_type": "constant"},
        checkpoint={"keep_best": True, **checkpoint},
        evaluation={"eval_steps": 1},
        data={"train": {"path": str(few)}, "eval": {"path": str(held_out)}},
        merge={"at_end": "peft"},
    )


def test_the_best_evaluation_may_be_the_runs_result(pools, tiny_llama, tmp_path, shell):
    """Its checkpoint is measured, summed up and merged at the end; started again, there is nothing to do."""
    config = overfitted(tiny_llama, tmp_path, load_best_at_end=True)
    run = Path(config.output_dir)
    outcomes = pools[2].run(attempt, config=config)
    assert [outcome.error for outcome in outcomes] == ["", ""]
    summary, state = json.loads((run / SUMMARY_FILE).read_text()), read_checkpoint(run / "checkpoint-8").state
    assert 0 < state.best_step < 7
    assert (summary["steps"], summary["result_step"]) == (8, state.best_step)
    assert summary["tuned_eval_loss"] == pytest.approx(state.best_loss, rel=1e-6)
    assert f"the run's result is checkpoint-{state.best_step}, loss {state.best_loss:.4f}" in outcomes[0].told
    (certificate,) = run.glob("merged*/certificate.json")
    said = json.loads(certificate.read_text())["adapter"]
    assert said["step"] == state.best_step and said["path"].endswith(f"checkpoint-{state.best_step}")
    figures = json.loads(shell("eval", run, "--json")[1])
    assert figures["tuned"]["loss"] == pytest.approx(summary["tuned_eval_loss"], rel=1e-5)
    later = json.loads(shell("eval", run / "checkpoint-8", "--json")[1])
    assert later["tuned"]["loss"] > figures["tuned"]["loss"] + 1e-3
    assert "nothing to do" in pools[2].run(attempt, config=config, resume="auto")[0].told


def test_a_last_step_that_is_the_best_is_the_result(pools, tiny_llama, tmp_path):
    """Also where it is better by less than the threshold by which early stopping counts."""
    sections = {"evaluation": {"eval_steps": 2, "early_stopping_patience": 9, "early_stopping_threshold": 100.0}}
    checkpoint = {"keep_best": True, "load_best_at_end": True}
    sections["data"] = {"eval_samples": 10}
    config = tiny_config(tiny_llama, tmp_path / "run", train={"max_steps": 6}, checkpoint=checkpoint, **sections)
    told = pools[2].run(attempt, config=config)[0].told
    summary = json.loads((tmp_path / "run" / SUMMARY_FILE).read_text())
    assert read_checkpoint(tmp_path / "run" / "checkpoint-6").state.best_step == 2
    assert summary["result_step"] == 6 and "best evaluation" not in told and "the run's result" not in told


def test_a_better_one_than_the_last_is_named_at_the_end(pools, tiny_llama, tmp_path):
    config = overfitted(tiny_llama, tmp_path)
    told = pools[1].run(attempt, config=config)[0].told
    state = read_checkpoint(Path(config.output_dir) / "checkpoint-8").state
    named = f"the best evaluation was that of checkpoint-{state.best_step}, loss {state.best_loss:.4f}"
    assert named in told and "the run's result" not in told
    assert json.loads((Path(config.output_dir) / SUMMARY_FILE).read_text())["result_step"] == 8


def test_a_run_that_gets_no_better_ends_early_and_stays_ended(pools, tiny_llama, tmp_path):
    config = tiny_config(
        tiny_llama,
        tmp_path / "run",
        train={"max_steps": 8},
        evaluation={"eval_steps": 1, "early_stopping_patience": 2, "early_stopping_threshold": 100.0},
        data={"eval_samples": 10},
    )
    for resume in (None, "auto"):
        assert [outcome.error for outcome in pools[2].run(attempt, config=config, resume=resume)] == ["", ""]
        # The last step is evaluated once: its model is the tuned one.
        metrics = [json.loads(line) for line in (tmp_path / "run" / METRICS_FILE).read_text().splitlines()]
        losses = [record["eval/loss"] for record in metrics if "eval/loss" in record and record["step"] == 3]
        assert losses == [json.loads((tmp_path / "run" / SUMMARY_FILE).read_text())["tuned_eval_loss"]]
        (path,) = list_checkpoints(tmp_path / "run")
        state = read_checkpoint(path).state
        assert (state.step, state.best_step, state.stopped_early) == (3, 1, True)
        assert steps_in_summary(tmp_path / "run") == 3
    longer = config.model_copy(update={"evaluation": EvaluationConfig()})
    pools[2].run(attempt, config=longer, resume="auto")
    assert steps_in_summary(tmp_path / "run") == 8


def test_a_run_that_stopped_early_says_why_and_goes_on_with_more_patience_or_other_held_out_data(
    pools, tiny_llama, tmp_path
):
    def config(held_out: int = 10, **evaluation: object) -> RunConfig:
        settings = {"eval_steps": 2, "early_stopping_patience": 1, "early_stopping_threshold": 100.0, **evaluation}
        data = write_data(tmp_path / f"held_out-{held_out}.jsonl", count=held_out)
        sections = {"train": {"max_steps": 12}, "evaluation": settings, "data": {"eval": {"path": str(data)}}}
        return tiny_config(tiny_llama, tmp_path / "run", **sections)

    def told(config: RunConfig, resume: str | None = "auto") -> str:
        (outcome,) = pools[1].run(attempt, config=config, resume=resume)
        assert outcome.error == ""
        return outcome.told

    path = tmp_path / "run"
    assert "stopped early: the last evaluation was not better than loss " in told(config(), None)
    assert [each.name for each in list_checkpoints(path)] == ["checkpoint-4"]
    again = told(config())
    assert f"{path / 'checkpoint-4'}: stopped early: the last evaluation was not better than loss " in again
    assert again.endswith("by more than 100; evaluation.early_stopping_patience is 1: nothing to do\n")
    more = told(config(early_stopping_patience=3, eval_steps=1))
    assert "evaluation.early_stopping_patience was 1 until step 4, it is now 3" in more
    assert "evaluation.eval_steps was 2 until step 4, it is now 1" in more
    state = read_checkpoint(path / "checkpoint-6").state
    assert (state.best_step, state.comparison.waited, state.stopped_early) == (2, 3, True)
    other = told(config(held_out=8))
    assert "no longer counts, because the held-out data are others now" in other
    assert other.count("base: held-out loss") == 1
    state = read_checkpoint(path / "checkpoint-10").state
    assert (state.best_step, state.comparison.waited, state.stopped_early) == (8, 1, True)
