"""The records of a run: read back with TensorBoard's own reader, line by line, and from a real terminal."""

import json
import os
import pty
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dist_qft.config.schema import ModelConfig, RunConfig
from dist_qft.errors import SetupError
from dist_qft.storage.checkpoint import list_checkpoints
from dist_qft.trackers.fan_out import TRACKERS_FOLDER
from dist_qft.training.event_files import EVENTS_FOLDER
from dist_qft.training.metrics_file import METRICS_FILE
from dist_qft.training.monitor import Monitor
from dist_qft.training.summary import SUMMARY_FILE
from tests.support.outcomes import Outcome, attempt
from tests.support.terminals import shown_on
from tests.support.tiny_model import tiny_config
from tests.support.tracker_files import read_trackio

STEPS = 12
PROMPT = "Say [b]cat[/b] :smile:"
TRAINING_TAGS = {
    "train/loss",
    "train/learning_rate",
    "train/grad_norm",
    "train/epoch",
    "train/target_tokens",
    "train/target_tokens_per_second",
    "traffic/gathered_bytes",
    "traffic/reduced_bytes",
    "time/data(s)",
    "time/gather(s)",
    "time/compute(s)",
    "time/reduce(s)",
    "time/straggler_gap(s)",
    "time/step(s)",
    "memory/rank0(MiB)",
    "memory/rank1(MiB)",
    "replicas/digest_checked",
}


@pytest.fixture(scope="module")
def watched(pools, tiny_llama, tmp_path_factory) -> tuple[Path, list[Outcome]]:
    """The folder of a run on two ranks with evaluations and answers, and what each rank said."""
    config = tiny_config(
        tiny_llama,
        tmp_path_factory.mktemp("watched") / "run",
        train={"max_steps": STEPS, "lr_scheduler_type": "linear", "report_to": ["tensorboard", "trackio"]},
        data={"eval_samples": 6},
        evaluation={"eval_steps": 5, "prompts": [PROMPT], "max_new_tokens": 3},
    )
    return Path(config.output_dir), pools[2].run(attempt, config=config)


def read_metrics(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / METRICS_FILE).read_text().splitlines()]


def by_tag(records: list[dict[str, object]]) -> dict[str, list[tuple[int, object]]]:
    """Tag -> (step, value) pairs in the order of the file."""
    found: dict[str, list[tuple[int, object]]] = {}
    for record in records:
        for tag, value in record.items():
            if tag != "step":
                found.setdefault(tag, []).append((record["step"], value))
    return found


def read_events(run_dir: Path) -> EventAccumulator:
    (folder,) = (run_dir / EVENTS_FOLDER).iterdir()
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def test_tensorboard_and_the_json_lines_hold_the_same_numbers(watched):
    run_dir, _ = watched
    events, metrics = read_events(run_dir), by_tag(read_metrics(run_dir))
    scalars = {tag for tag in events.Tags()["scalars"] if not tag.startswith("result/")}
    texts = {tag.removesuffix("/text_summary") for tag in events.Tags()["tensors"]}
    assert scalars | texts == set(metrics)
    assert scalars == TRAINING_TAGS | {"base/loss", "base/perplexity", "eval/loss", "eval/perplexity"}
    for tag in scalars:
        recorded = [(event.step, event.value) for event in events.Scalars(tag)]
        assert recorded == [(step, np.float32(value)) for step, value in metrics[tag]], tag
    for tag in texts:
        recorded = [
            (event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors(f"{tag}/text_summary")
        ]
        assert recorded == metrics[tag], tag


def test_a_tracker_gets_the_same_numbers_and_texts(watched):
    run_dir, _ = watched
    metrics, found = by_tag(read_metrics(run_dir)), read_trackio(run_dir / TRACKERS_FOLDER)
    tags = {tag for _, tag, _ in found.figures} | {tag for _, tag, _ in found.texts}
    assert {tag for tag in tags if not tag.startswith("result/")} == set(metrics)
    for tag in tags & set(metrics):
        texts = [(step, text) for step, name, text in found.texts if name == tag]
        assert (texts or found.by_tag(tag)) == metrics[tag], tag
    assert found.by_tag("result/final_train_loss") == [(STEPS, metrics["train/loss"][-1][1])]
    assert found.config["train"]["max_steps"] == STEPS


def test_the_numbers_are_those_of_the_run(watched):
    run_dir, outcomes = watched
    metrics, history = by_tag(read_metrics(run_dir)), outcomes[0].history
    summary = json.loads((run_dir / SUMMARY_FILE).read_text())
    steps = list(range(1, STEPS + 1))
    for tag in TRAINING_TAGS:
        assert [step for step, _ in metrics[tag]] == steps, tag
    values = {tag: [value for _, value in pairs] for tag, pairs in metrics.items()}
    assert values["train/loss"] == [entry.loss for entry in history]
    assert values["train/grad_norm"] == [entry.grad_norm for entry in history]
    assert values["train/learning_rate"] == pytest.approx([5e-3 * (1 - step / STEPS) for step in range(STEPS)])
    assert values["train/epoch"] == pytest.approx([8 * step / 54 for step in steps])
    assert [step for step, checked in metrics["replicas/digest_checked"] if checked] == [1, 11, 12]
    assert metrics["base/loss"] == [(0, summary["base_eval_loss"])]
    assert metrics["eval/loss"][-1] == (STEPS, summary["tuned_eval_loss"])
    assert [step for step, _ in metrics["eval/loss"]] == [5, 10, STEPS]
    assert [step for step, _ in metrics["answer/eval"]] == [5, 10]
    assert metrics["answer/base"][0][1].startswith(PROMPT + "\n\n")

    trainable = summary["trainable_parameters"]
    assert set(values["traffic/reduced_bytes"]) == {summary["reduce_bytes_per_step"]}
    assert 4 * trainable < summary["reduce_bytes_per_step"] < 4 * trainable + 512
    assert set(values["traffic/gathered_bytes"]) == {summary["gather_bytes_per_step"]}
    assert summary["gather_bytes_per_step"] > 0
    assert all(50 < memory < 50_000 for rank in (0, 1) for memory in values[f"memory/rank{rank}(MiB)"])


def test_the_times_add_up(watched):
    run_dir, _ = watched
    for record in read_metrics(run_dir):
        if "time/step(s)" in record:
            parts = [record[f"time/{part}(s)"] for part in ("data", "compute", "reduce")]
            assert 0 < sum(parts) <= record["time/step(s)"]
            assert 0 < record["time/gather(s)"] <= record["time/compute(s)"], "gathering is part of computing"
            rate = record["train/target_tokens"] / record["time/step(s)"]
            assert record["train/target_tokens_per_second"] == pytest.approx(rate)


def test_settings_and_results_are_there_to_compare_runs_by(watched):
    run_dir, _ = watched
    events = read_events(run_dir)
    summary = json.loads((run_dir / SUMMARY_FILE).read_text())
    for key in ("base_eval_loss", "tuned_eval_loss", "final_train_loss"):
        assert [event.value for event in events.Scalars(f"result/{key}")] == [np.float32(summary[key])]
    content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    for setting in (b"learning_rate", b"pool", b"world_size", b"qahira", b"fsdp"):
        assert setting in content


def test_only_rank_0_writes_and_speaks(pools, watched):
    run_dir, outcomes = watched
    pids = pools[2].run(os.getpid)
    files = list((run_dir / EVENTS_FOLDER).rglob("events.*"))
    assert {int(path.name.split(".")[-2]) for path in files} == {pids[0]}
    assert outcomes[1].told == ""
    lines = outcomes[0].told.splitlines()
    told = [line.split("  ")[0] for line in lines if line.startswith("step ")]
    assert told == [f"step {step}/{STEPS}" for step in range(1, STEPS + 1)]
    assert lines.count(f"base: {PROMPT}") == lines.count(f"tuned: {PROMPT}") == 1, "shown as it is"
    assert "\x1b" not in outcomes[0].told, "no terminal codes where there is no terminal"
    assert sum("held-out loss" in line for line in lines) == 4


def test_logging_steps_thins_out_the_training_records_but_keeps_the_last(pools, tiny_llama, tmp_path):
    config = tiny_config(tiny_llama, tmp_path / "run", train={"max_steps": 7, "logging_steps": 3, "report_to": "none"})
    pools[1].run(attempt, config=config)
    assert [step for step, _ in by_tag(read_metrics(tmp_path / "run"))["train/loss"]] == [3, 6, 7]
    assert not (tmp_path / "run" / EVENTS_FOLDER).exists(), "report_to: none"


def test_a_resumed_run_reports_no_step_twice(pools, tiny_llama, tmp_path):
    run_dir = tmp_path / "run"
    config = tiny_config(tiny_llama, run_dir, train={"max_steps": 6}, checkpoint={"save_steps": 4})
    pools[1].run(attempt, config=config)
    # As if it had been killed at step 6: no checkpoint of it, and the last line cut short.
    shutil.rmtree(list_checkpoints(run_dir)[-1])
    (run_dir / SUMMARY_FILE).unlink()
    with open(run_dir / METRICS_FILE, "a") as metrics:
        metrics.write('{"step": 4, "train/lo')
    config = tiny_config(tiny_llama, run_dir, train={"max_steps": 7, "learning_rate": 1e-3})
    pools[1].run(attempt, config=config, resume="auto")
    expected = [(step, 5e-3 if step <= 4 else 1e-3) for step in range(1, 8)]
    assert by_tag(read_metrics(run_dir))["train/learning_rate"] == expected
    recorded = [(event.step, event.value) for event in read_events(run_dir).Scalars("train/learning_rate")]
    assert recorded == [(step, np.float32(rate)) for step, rate in expected]


def bare_config(output_dir: Path) -> RunConfig:
    return RunConfig(output_dir=str(output_dir), model=ModelConfig(path="base"))


def test_a_fresh_run_does_not_inherit_the_records_of_one_that_saved_nothing(tmp_path):
    (tmp_path / METRICS_FILE).write_text('{"step": 0, "base/loss": 3.0}\n{"step": 1, "train/loss": 3.0}\n')
    monitor = Monitor(bare_config(tmp_path), active=True, total_steps=3)
    monitor.scalars(1, {"train/loss": 2.0})
    monitor.close()
    assert read_metrics(tmp_path) == [{"step": 1, "train/loss": 2.0}]


def test_records_that_cannot_be_written_are_a_fault_of_the_environment(tmp_path):
    (tmp_path / EVENTS_FOLDER).write_text("in the way")
    with pytest.raises(SetupError, match=f"{tmp_path}: cannot record metrics: ") as failure:
        Monitor(bare_config(tmp_path), active=True, total_steps=3)
    assert failure.value.exit_code == 3


def test_a_file_gets_lines_though_colours_are_forced(tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with open(tmp_path / "log", "w") as log:
        monkeypatch.setattr(sys, "stderr", log)
        write_a_step(tmp_path)
    assert (tmp_path / "log").read_text() == "step 2/3  for lines alone\n"


def test_a_dumb_terminal_gets_lines(tmp_path, monkeypatch):
    ours, theirs = pty.openpty()
    monkeypatch.setenv("TERM", "dumb")
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        write_a_step(tmp_path)
    shown = shown_on(ours)
    assert "for lines alone" in shown and "\x1b[?25l" not in shown


def write_a_step(folder: Path) -> None:
    monitor = Monitor(bare_config(folder), active=True, total_steps=3)
    monitor.start()
    monitor.progress(2, 3, "for lines alone")
    monitor.close()


def test_a_terminal_gets_a_bar_that_is_gone_after_a_failure(tmp_path, monkeypatch):
    ours, theirs = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        monitor = Monitor(bare_config(tmp_path), active=True, total_steps=3)
        monitor.say("before")
        monitor.start()
        monitor.scalars(2, {"train/loss": 1.25})
        monitor.progress(2, 3, "for lines alone")
        monitor.say("base: [b]held-out[/b]")
        monitor.close()
        monitor.close()
        monitor.say("after")
    shown = shown_on(ours)
    assert "2/3" in shown and "loss 1.2500" in shown and "for lines alone" not in shown
    assert "[b]held-out[/b]" in shown
    assert "after" not in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1, "the cursor is hidden, then shown again"
