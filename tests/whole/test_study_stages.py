"""A study with a search, merges and contrasts through the real command."""

import gc
import json
from pathlib import Path

import pytest
import torch

from dist_qft.errors import Preempted
from dist_qft.storage.lock import FolderLock
from dist_qft.study import run, runner
from dist_qft.study.result_file import Result, read_result, read_rows, write_result
from dist_qft.study.rows import expand, expand_all
from dist_qft.study.settings import load_study
from dist_qft.training.training_run import TrainingRun
from tests.support.study_files import SEARCHED_ON, write_study
from tests.support.tiny_model import write_data

ARMS = {
    "aligned": {"method": {"name": "qahira", "rank": 4, "alpha": 4, "repeat": 1, "pool": 32}},
    "pair": {"method": {"name": "qlora", "rank": 4, "alpha": 4}},
    "pair's file": {"method": {"name": "qlora", "rank": 4, "alpha": 4}},
}
CHOSEN_BY = [{"metric": "merged_loss", "when": {"arm": "pair's file"}}]
KEYS = {
    "presets": None,
    "seeds": [0, 1],
    "axes": {"arm": ARMS},
    "set": {"quantization": {"linear": "affine4", "block": [1, 32]}},
    "tune": {"tries": 2, "factor": 4, "widen": 0, "metric": CHOSEN_BY},
    "merge": [
        {"to": "quantized", "when": {"arm": "aligned"}},
        {"to": "quantized", "requantize": "affine4", "when": {"arm": "pair"}},
        {"to": "quantized", "requantize": "affine4", "when": {"arm": "pair's file"}},
    ],
    "contrasts": [
        {"claim": "aligned wins", "better": "aligned", "than": "pair", "metric": "merged_loss", "primary": True},
        {"claim": "free", "better": "aligned", "than": "aligned", "metric": "merged_loss", "than_metric": "loss"},
    ],
}


def searched_on(folder: Path) -> dict:
    """The settings of a search that has held-out data of its own."""
    return {**SEARCHED_ON, "data.eval": {"path": str(write_data(folder / "tune.jsonl", 6))}}


def test_search_merge_contrasts_and_report(shell, tiny_llama, tmp_path):
    tune = {**KEYS["tune"], "set": searched_on(tmp_path)}
    path = write_study(tmp_path, tiny_llama, **{**KEYS, "tune": tune})
    study = load_study(path)
    first = expand_all(study)
    assert [row.tries is not None for row in first.rows] == [True] * 4 and len(first.waiting) == 6
    code, _, err = shell("study", path)
    assert code == 0, err
    known = expand_all(study)
    compared = [row for row in known.rows if row.tries is None]
    assert len(compared) == 6 and not known.waiting
    for row in compared:
        result, rows = read_result(row.folder), read_rows(row.folder, "merged")
        assert result.train_tokens > 0 and result.costs["seconds_per_step"] > 0 and result.costs["activation_bytes"] > 0
        total = sum(score.loss for score in rows.values()) / sum(score.targets for score in rows.values())
        assert len(rows) == 8 and total == pytest.approx(result.tuned["merged_loss"], rel=1e-5)
        assert not (row.folder / "merged").exists() and not list(row.folder.glob("checkpoint-*"))
        assert row.config.train.learning_rate == known.searches[row.label, row.variants[0]].best
    aligned = [read_result(row.folder).tuned for row in compared if row.label == "aligned"]
    assert [each["merged_loss"] for each in aligned] == pytest.approx([each["loss"] for each in aligned], abs=1e-3)

    report = tmp_path / "out" / "report"
    contrasts = json.loads((report / "contrasts.json").read_text())
    assert len(contrasts) == 2 and all(each["interval_95_rows"] for each in contrasts)
    assert len(json.loads((report / "tuning.json").read_text())) == 3
    page = (report / "report.html").read_text()
    assert "aligned wins" in page and 'id="tuning"' in page and "held-out tokens" in page

    before = {row.name for row in expand(study)}
    code, _, err = shell("study", path, "--no-report")
    assert (code, err) == (0, "") and {row.name for row in expand(study)} == before
    code, out, _ = shell("study", path, "--plan")
    assert code == 0 and f"{len(before)} runs, 0 to do" in out


def test_a_plan_tries_what_it_cannot_know(shell, tiny_llama, tmp_path):
    path = write_study(tmp_path, tiny_llama, presets=None, axes={"train.weight_decay": [0.0, 0.1]})
    code, out, err = shell("study", path, "--plan")
    assert code == 0, err
    assert "4 runs, 4 to do" in out and "(1 trials of 5 steps)" in out
    assert not (tmp_path / "out" / "runs").exists()


def test_a_process_waits_for_a_search_that_another_one_ends(tiny_llama, tmp_path, monkeypatch):
    """And takes its run over if it dies; both are needed, or the last runs would be left to one of them."""
    monkeypatch.setattr(run, "_POLL_SECONDS", 0.05)
    tune = {"set": searched_on(tmp_path), "values": [1e-3, 2e-3], "widen": 0}
    study = load_study(write_study(tmp_path, tiny_llama, presets=None, seeds=[0], axes={"arm": {"a": {}}}, tune=tune))
    rows = expand(study)
    locks = []
    for row in rows:
        row.folder.mkdir(parents=True)
        locks.append(FolderLock.acquire(row.folder / run._LOCK, "a study"))
    asked: list[int] = []

    def further():
        asked.append(len(asked))
        if len(asked) == 4:
            write_result(rows[0].folder, Result(rows[0].name, tuned={"loss": 1.0}))
            for lock in locks:
                lock.release()
        return expand_all(study)

    run.run_rows(rows, range(len(rows)), retry_failed=False, further=further)
    known = expand_all(study)
    assert len(asked) > 4 and not known.waiting
    assert all(read_result(row.folder).exit_code == 0 for row in known.rows) and len(known.rows) == 3


@pytest.mark.parametrize("patience", [None, 1])
def test_a_study_that_is_stopped_in_a_merge_trains_no_step_twice(tiny_llama, tmp_path, monkeypatch, patience):
    """Two rows that are learned by heart, so that an earlier checkpoint is the result, and patience ends the run."""
    few, held_out = write_data(tmp_path / "few.jsonl", 2), write_data(tmp_path / "held_out.jsonl", 12)
    settings = {
        "data": {"train": {"path": str(few)}, "eval": {"path": str(held_out)}, "eval_samples": 0},
        "evaluation": {"eval_steps": 1, "early_stopping_patience": patience},
        "checkpoint": {"save_total_limit": 2, "keep_best": True, "load_best_at_end": True},
    }
    train = {"max_steps": 8, "learning_rate": 0.3, "max_grad_norm": None, "lr_scheduler_type": "constant"}
    keys = {"presets": None, "seeds": [0], "axes": {"arm": {"a": {}}}, "set": settings}
    keys |= {"merge": {"to": "dense"}, "keep": ["adapter"]}
    results, steps, trained, merged = [], [], TrainingRun.run_step, runner.merge_and_measure

    def counted(run_of_steps):
        steps.append(run_of_steps.state.step)
        return trained(run_of_steps)

    def stopped(*arguments):
        monkeypatch.setattr(runner, "merge_and_measure", merged)
        raise Preempted("stopped by a signal")

    monkeypatch.setattr(TrainingRun, "run_step", counted)
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        rows = expand(load_study(write_study(tmp_path / name, tiny_llama, train=train, **keys)))
        steps.clear()
        if name == "stopped":
            monkeypatch.setattr(runner, "merge_and_measure", stopped)
            with pytest.raises(Preempted):
                run.run_rows(rows, [0], retry_failed=False)
        run.run_rows(rows, [0], retry_failed=False)
        summary = json.loads((rows[0].folder / "summary.json").read_text())
        kept = sorted(path.name for path in rows[0].folder.glob("checkpoint-*"))
        results.append((read_result(rows[0].folder), list(steps), summary["result_step"], kept))
    (whole, *others), (again, *same) = results
    assert same == others and steps == list(range(len(whole.history)))
    assert 0 < others[1] < len(steps) and (len(steps) < 8) == (patience is not None)
    for figure in ("exit_code", "error", "base", "tuned", "history", "train_tokens"):
        assert getattr(again, figure) == getattr(whole, figure)
    assert dict(again.held_out) == dict(whole.held_out)


def test_nothing_of_a_run_is_held_while_the_next_ones_are_done(tiny_llama, tmp_path, monkeypatch):
    held, done = [], run.Runner.run

    def counted(runner, row):
        held.append(sum(each.numel() for each in gc.get_objects() if isinstance(each, torch.Tensor)))
        return done(runner, row)

    monkeypatch.setattr(run.Runner, "run", counted)
    axes = {"train.weight_decay": [0.0, 0.1, 0.2, 0.3]}
    path = write_study(tmp_path, tiny_llama, presets=None, seeds=[0], axes=axes, merge={"to": "dense"})
    rows = expand(load_study(path))
    run.run_rows(rows, range(len(rows)), retry_failed=False)
    assert held[3] - held[2] < 0.02 * held[2]
