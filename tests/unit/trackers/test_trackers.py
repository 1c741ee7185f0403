"""Trackers: the real libraries writing to disk, processes that hang or die, secrets, missing packages."""

import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from dist_qft.errors import SetupError
from dist_qft.trackers import fan_out
from dist_qft.trackers.fan_out import TRACKERS_FOLDER, Trackers
from dist_qft.trackers.kinds import TRACKERS, chosen, require_installed
from dist_qft.trackers.libraries import mlflow_name
from dist_qft.trackers.secrets import without_secrets
from tests.support.tracker_files import READERS

TOKEN = "hf_" + "x" * 30
CONFIG = {
    "model": {"path": f"{Path.home()}/models/a"},
    "train": {"learning_rate": 1e-3},
    "evaluation": {"prompts": [f"my token is {TOKEN}"]},
}


def open_trackers(output_dir: Path, *names: str, resumed: bool = False) -> tuple[Trackers, list[str]]:
    notes: list[str] = []
    return Trackers(names, output_dir, CONFIG, resumed=resumed, say=notes.append), notes


@pytest.mark.parametrize("name", TRACKERS)
def test_a_run_and_its_resumption_are_one_run_of_the_library(name, tmp_path, monkeypatch):
    pytest.importorskip(name)
    monkeypatch.setattr(fan_out, "STOPPED_SECONDS", 120.0)
    monkeypatch.setattr(fan_out, "FINISHED_SECONDS", 120.0)
    folder = tmp_path / "my-run" / TRACKERS_FOLDER
    for first in (0, 3):
        trackers, notes = open_trackers(tmp_path / "my-run", name, resumed=first > 0)
        for step in range(first + 1, first + 4):
            trackers.scalars(step, {"train/loss": 1 / step, "time/step(s)": math.nan})
        trackers.text(first + 3, "answer/eval", "of **all**\n\nwords")
        if first:
            trackers.hparams({}, {"result/loss": 0.5})
        trackers.close()
        assert len(notes) == 1 and notes[0].startswith(f"{name}: ") and str(folder) in notes[0]
    found, step_seconds = READERS[name](folder), "time/step_s" if name == "mlflow" else "time/step(s)"
    assert found.runs == {json.loads((folder / f"{name}.json").read_text())["run_id"]}
    assert found.by_tag("train/loss") == [(step, 1 / step) for step in range(1, 7)]
    assert [step for step, value in found.by_tag(step_seconds) if math.isnan(value)] == list(range(1, 7))
    assert found.texts == [(step, "answer/eval", "of **all**\n\nwords") for step in (3, 6)]
    assert "0.001" in str(found.config) and TOKEN not in str(found.config)
    assert "~/models/a" in str(found.config) and f"{Path.home()}/models" not in str(found.config)
    if name != "wandb":  # W&B keeps results in its summary
        assert found.by_tag("result/loss") == [(6, 0.5)]


def test_a_failure_in_the_middle_is_told_once_and_later_records_are_tried(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setattr(fan_out, "STOPPED_SECONDS", 120.0)
    trackers, notes = open_trackers(tmp_path, "mlflow")
    wait_for(lambda: trackers.flush() or notes)
    with closing(sqlite3.connect(tmp_path / TRACKERS_FOLDER / "mlflow.db")) as store:
        store.executescript("ALTER TABLE metrics RENAME TO gone")
    trackers.scalars(1, {"train/loss": 1.0})
    trackers.scalars(2, {"train/loss": 1.0})
    wait_for(lambda: trackers.flush() or len(notes) > 1)
    with closing(sqlite3.connect(tmp_path / TRACKERS_FOLDER / "mlflow.db")) as store:
        store.executescript("ALTER TABLE gone RENAME TO metrics")
    trackers.scalars(3, {"train/loss": 3.0})
    trackers.close()
    assert len(notes) == 2 and "could not record step 1" in notes[1]
    assert READERS["mlflow"](tmp_path / TRACKERS_FOLDER).by_tag("train/loss")[-1] == (3, 3.0)


def wait_for(condition) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def process_of(trackers: Trackers) -> int:
    return trackers._processes[0]._process.pid


def test_a_tracker_that_hangs_costs_neither_time_nor_memory_and_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(fan_out, "STOPPED_SECONDS", 0.3)
    monkeypatch.setattr(fan_out, "WAITING_BYTES", 1 << 18)
    trackers, notes = open_trackers(tmp_path, "trackio")
    process = process_of(trackers)
    os.kill(process, signal.SIGSTOP)
    for step in range(100):
        before = time.process_time()
        trackers.text(step, "answer/eval", "x" * 10_000)
        assert time.process_time() - before < 0.1
    assert len(notes) == 1 and "does not keep up" in notes[0]
    before = time.monotonic()
    trackers.close()
    assert time.monotonic() - before < 5
    assert len(notes) == 2 and "did not end within 0.3 s" in notes[1]
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    trackers.close()


def test_a_tracker_that_dies_is_told_once(tmp_path):
    trackers, notes = open_trackers(tmp_path, "trackio")
    os.kill(process_of(trackers), signal.SIGKILL)
    wait_for(lambda: trackers.scalars(1, {"train/loss": 1.0}) or notes)
    trackers.scalars(2, {"train/loss": 1.0})
    trackers.close()
    assert len(notes) == 1 and "has ended by itself (exit code -9)" in notes[0]


@pytest.mark.parametrize("name", TRACKERS)
def test_a_trainer_that_was_killed_within_a_record_leaves_a_run_that_ended(name, tmp_path):
    pytest.importorskip(name)
    opening = {"folder": str(tmp_path), "name": "run", "config": {}, "resumed": False}
    record = json.dumps({"step": 1, "figures": {"train/loss": 0.5}})
    command = [sys.executable, "-m", "dist_qft.trackers.process", name]
    lines = f"{json.dumps(opening)}\n{record}\n{record[:-4]}"
    found = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0 and "Traceback" not in found.stderr, found.stderr
    assert READERS[name](tmp_path).by_tag("train/loss") == [(1, 0.5)]


def test_a_library_that_cannot_begin_is_told_once(tmp_path):
    (tmp_path / TRACKERS_FOLDER).mkdir()
    (tmp_path / TRACKERS_FOLDER / "trackio").write_text("in the way")
    trackers, notes = open_trackers(tmp_path, "trackio")
    wait_for(lambda: trackers.flush() or notes)
    trackers.scalars(1, {"train/loss": 1.0})
    trackers.close()
    assert len(notes) == 1 and notes[0].startswith("trackio: records nothing: ")
    assert "Traceback" in (tmp_path / TRACKERS_FOLDER / "trackio.log").read_text()


def test_a_missing_package_is_refused_and_a_folder_of_its_name_is_none(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()  # as W&B makes one where it runs
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in TRACKERS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(SetupError, match=r"train.report_to: wandb .*; pip install 'dist-qft\[wandb\]'") as refusal:
        require_installed(["tensorboard", "wandb"])
    assert refusal.value.exit_code == 3
    assert chosen("all") == ("tensorboard",)
    require_installed("all")
    assert chosen("none") == chosen([]) == ()
    assert chosen(["trackio", "tensorboard", "trackio"]) == ("trackio", "tensorboard")


@pytest.mark.parametrize(
    "text, shown",
    [
        (f"a {TOKEN} b", "a *** b"),
        ("https://me:word@host/data.jsonl?sig=abc#x", "https://***@host/data.jsonl?***#x"),
        ("of the environment: correct-horse.", "of the environment: ***."),
        ("plain words, 1e-4, model.layers.0?", "plain words, 1e-4, model.layers.0?"),
    ],
)
def test_secrets_are_hidden_wherever_they_stand(text, shown):
    env = {"MY_API_KEY": "correct-horse", "TOKENIZERS_PARALLELISM": "false", "HOME": "plain words"}
    assert without_secrets({"a": [text, 1, None]}, env) == {"a": [shown, 1, None]}


def test_names_in_the_characters_of_mlflow():
    assert mlflow_name("memory/rank0(MiB)") == "memory/rank0_MiB"
    assert mlflow_name("train/loss") == "train/loss"
