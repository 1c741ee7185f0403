"""Reports, suggestions and the choice of runs to do, from results that are put in place of runs."""

import csv
import json

import pytest
from matplotlib.axes import Axes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dist_qft.errors import UserError
from dist_qft.study.command import run_study
from dist_qft.study.report import write_report
from dist_qft.study.result_file import Result, write_result
from dist_qft.study.rows import expand
from dist_qft.study.run import _tell, _Work
from dist_qft.study.settings import load_study
from dist_qft.study.suggest import write_suggestions
from tests.support.study_files import SEARCHED_ON, write_study


def put(row, loss: float | None) -> None:
    """The result of a run; of one that failed for None."""
    if loss is None:
        write_result(row.folder, Result.failed(row, 6, "non-finite"))
    else:
        figures = {"base": {"loss": 4.0}, "tuned": {"loss": loss}}
        write_result(row.folder, Result(row.name, history=[3.0, loss], trainables=row.trainables, **figures))


def test_variants_without_a_seed_of_the_reference_are_left_out(tiny_llama, tmp_path):
    presets = [{"preset": "rank_by_type", "values": [1], "groups": ["attention", "mlp"]}]
    study = load_study(write_study(tmp_path, tiny_llama, presets=presets, seeds=[0, 1]))
    for row in expand(study):
        group, seed = row.variants[0].group, row.config.train.seed
        if (group, seed) in {("", 0), ("attention", 0), ("mlp", 1)}:
            put(row, 2.0)
    write_report(study)
    page = (tmp_path / "out" / "report" / "report.html").read_text()
    assert "rank_by_type attention 1" in page
    entries = json.loads((tmp_path / "out" / "report" / "results.json").read_text())
    assert sum(entry["status"] == "done" for entry in entries) == 3


def test_seeds_that_ended_at_different_steps_share_a_curve(tiny_llama, tmp_path, monkeypatch):
    """As `evaluation.early_stopping_patience` ends them. Each step is the mean of the seeds that have it."""
    histories = {0: [3.0, 2.0, 1.0], 1: [5.0, 4.0], 2: []}
    drawn, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda axes, *data, **style: (drawn.append(data), plot(axes, *data, **style))[1])
    study = load_study(write_study(tmp_path, tiny_llama, presets=None, seeds=[0, 1, 2], axes={"arm": {"a": {}}}))
    for row in expand(study):
        figures = {"base": {"loss": 4.0}, "tuned": {"loss": 2.0}}
        write_result(row.folder, Result(row.name, history=histories[row.config.train.seed], **figures))
    write_report(study)
    assert ([1, 2, 3], [4.0, 3.0, 1.0]) in drawn
    lines = list(csv.DictReader((tmp_path / "out" / "report" / "results.csv").read_text().splitlines()))
    assert [line["last_training_loss"] for line in lines] == ["1.000000", "4.000000", ""]


def test_a_run_without_a_history_is_told_and_in_the_hparams_without_its_loss(tiny_llama, tmp_path, capsys):
    study = load_study(write_study(tmp_path, tiny_llama, presets=None, seeds=[0], axes={"arm": {"a": {}}}))
    (row,) = expand(study)
    _tell(0, 1, row, Result(row.name, seconds=2.0))
    assert capsys.readouterr().err.endswith(": 2 s\n")
    write_result(row.folder, Result(row.name, base={"loss": 4.0}, tuned={"loss": 2.0}))
    write_report(study)
    events = EventAccumulator(str(tmp_path / "out" / "hparams" / row.name)).Reload()
    assert events.Tags()["scalars"] == ["result/held_out_loss"]


def test_labels_are_shown_as_they_are_written(tiny_llama, tmp_path):
    """Matplotlib reads $...$ as a formula, and leaves labels with a leading underscore out of its legend."""
    arms = {r"r $\foo$": {}, "_hidden": {"train.weight_decay": 0.1}}
    tune = {"set": SEARCHED_ON, "values": [1e-3, 2e-3], "widen": 0}
    contrasts = [{"claim": "c", "better": "_hidden", "than": r"r $\foo$"}]
    keys = {"presets": None, "seeds": [0], "axes": {"arm": arms}, "tune": tune, "contrasts": contrasts}
    study = load_study(write_study(tmp_path, tiny_llama, **keys))
    for _ in range(2):
        for row in expand(study):
            put(row, 2.0)
    write_report(study)
    drawn = (tmp_path / "out" / "report" / "figures" / "tuning.svg").read_text()
    assert "<!--  _hidden -->" in drawn and r"<!-- r $\foo$ -->" in drawn


def test_a_value_that_fails_is_not_chosen_and_no_failure_of_the_study(tiny_llama, tmp_path, capsys):
    presets = [{"preset": "rank_by_type", "values": [1], "groups": ["mlp"]}]
    tune = {"set": SEARCHED_ON, "values": [1e-3, 2e-3, 4e-3], "widen": 0}
    path = write_study(tmp_path, tiny_llama, presets=presets, seeds=[0], tune=tune)
    study = load_study(path)
    for row in expand(study):
        put(row, None if row.tries == 4e-3 else row.tries)
    for row in expand(study):
        if row.tries is None:
            put(row, 2.0)
    whole = {"plan": False, "count": False, "row": None, "report": False, "suggest": None, "jobs": 1}
    assert run_study(path, write_report=True, retry_failed=False, **whole) == 0
    assert "1 values of the search failed and are not chosen" in capsys.readouterr().err
    write_suggestions(study, expand(study), budget=10**9)
    compared = [row for row in expand(study) if row.tries is None]
    put(compared[0], None)
    with pytest.raises(UserError, match="1 of 5 runs are not done"):
        write_suggestions(study, expand(study), budget=10**9)


def test_a_run_that_failed_again_elsewhere_is_not_tried_once_more(tiny_llama, tmp_path):
    presets = [{"preset": "rank_by_type", "values": [1], "groups": ["mlp"]}]
    rows = expand(load_study(write_study(tmp_path, tiny_llama, presets=presets, seeds=[0])))
    put(rows[0], None)
    work = _Work(rows, retry_failed=True)
    assert [work.wants(row) for row in rows] == [True, True]
    put(rows[0], None)  # by another process of the same command
    put(rows[1], 2.0)
    assert [work.wants(row) for row in rows] == [False, False]
