"""Whole studies through the real command: resumed, shared by processes, failed and retried, reported."""

import csv
import json
import shutil
import signal
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dist_qft.config.load import load_config
from dist_qft.study.result_file import RESULT_FILE, read_result
from dist_qft.study.rows import expand
from dist_qft.study.run import run_rows
from dist_qft.study.settings import load_study
from tests.support.commands import Command, Finished
from tests.support.study_files import write_study

PRESETS = [
    {"preset": "rank_by_type", "values": [1]},
    {"preset": "rank_by_depth", "values": [1]},
    {"preset": "balance_by_type", "values": [1, 4]},
    {"preset": "equal_discount", "discount": 0.2, "groups": ["attention", "mlp"]},
]
COUNT = 2 * (1 + 2 + 3 + 4 + 2)


@pytest.fixture
def study(shell):
    """`study(*words)`: the command in this process, for tests of what it finds, writes and prints."""
    return lambda *words: Finished(*shell("study", *words))


def result_files(folder: Path) -> dict[str, Path]:
    return {path.parent.name: path for path in sorted((folder / "out" / "runs").glob(f"*/{RESULT_FILE}"))}


def report_files(folder: Path) -> dict[str, bytes]:
    report = folder / "out" / "report"
    return {str(path.relative_to(report)): path.read_bytes() for path in sorted(report.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def finished(tiny_llama, tmp_path_factory):
    """A study that was done in one go, with its report."""
    folder = tmp_path_factory.mktemp("finished")
    path = write_study(folder, tiny_llama, presets=PRESETS)
    with Command("study", path) as command:
        found = command.finish()
    assert found.code == 0, found.err
    assert found.err.count("held-out loss") == COUNT
    assert found.out.startswith(f"report of {COUNT} of {COUNT} runs: {folder}/out/report/report.html")
    return folder


def test_interrupted_and_started_again_only_the_rest_is_run_and_the_report_is_the_same(finished, study, tmp_path):
    """The same folder with the same files, so that even the data's path and the names of runs are equal."""
    kept = tmp_path / "kept"
    finished_report = report_files(finished)
    finished.rename(kept)
    finished.mkdir()
    try:
        for name in ("base.yaml", "study.yaml", "data.jsonl"):
            shutil.copy(kept / name, finished / name)
        with Command("study", finished / "study.yaml") as command:
            command.wait_until(lambda: len(result_files(finished)) >= 5)
            command.process.send_signal(signal.SIGTERM)
            stopped = command.finish()
        assert stopped.code == 75, stopped.err
        before = {name: path.stat().st_mtime_ns for name, path in result_files(finished).items()}
        assert 5 <= len(before) < COUNT
        again = study(finished / "study.yaml")
        assert again.code == 0, again.err
        assert again.err.count("held-out loss") == COUNT - len(before)
        after = {name: path.stat().st_mtime_ns for name, path in result_files(finished).items()}
        assert {name: after[name] for name in before} == before and len(after) == COUNT
        assert report_files(finished) == finished_report
        nothing = study(finished / "study.yaml", "--no-report")
        assert (nothing.code, nothing.out, nothing.err) == (0, "", "")
    finally:
        shutil.rmtree(finished)
        kept.rename(finished)


def test_what_was_trained_is_what_the_formula_says(finished):
    rows = expand(load_study(finished / "study.yaml"))
    assert {row.name: read_result(row.folder).trainables for row in rows} == {row.name: row.trainables for row in rows}
    equal = [row.trainables for row in rows if row.variants[0].preset == "equal_discount"]
    assert len(equal) == 4 and max(equal) - min(equal) <= 0.01 * rows[0].trainables
    # No checkpoint is left: the results are what a study is for.
    assert not list((finished / "out" / "runs").glob("*/checkpoint-*"))


def test_a_run_on_a_shared_base_equals_the_run_alone(finished, study, tmp_path):
    rows = expand(load_study(finished / "study.yaml"))
    for number in (3, COUNT - 1):
        moved = rows[number].folder.rename(tmp_path / str(number))
        alone = study(finished / "study.yaml", "--row", number)
        assert alone.code == 0, alone.err
        for figure in ("base", "tuned", "history"):
            assert getattr(read_result(rows[number].folder), figure) == getattr(read_result(moved), figure)


def test_several_processes_share_the_runs(finished, tiny_llama, tmp_path):
    path = write_study(tmp_path, tiny_llama, presets=PRESETS[:1])
    with Command("study", path, "--jobs", 2, "--no-report") as command:
        found = command.finish()
    assert found.code == 0, found.err
    assert found.err.count("held-out loss") == len(result_files(tmp_path)) == 6


def test_a_failed_run_is_recorded_shown_and_run_again_on_request(study, tiny_llama, tmp_path):
    """One learning rate is so high that the numbers become non-finite."""
    axes = {"train.learning_rate": [1e-3, 1e30]}
    train = {"max_steps": 3, "max_grad_norm": None}
    path = write_study(tmp_path, tiny_llama, axes=axes, presets=None, seeds=[0], train=train)
    found = study(path)
    assert found.code == 6
    assert (
        "failed with exit code 6: " in found.err and "1 of 2 runs failed; --retry-failed runs them again" in found.err
    )
    assert "Runs that failed" in (tmp_path / "out" / "report" / "report.html").read_text()
    assert study(path, "--count").out == "2\n"

    again = study(path)
    assert (again.code, again.err.count("non-finite")) == (6, 0)
    assert study(path, "--row", 0).code == 0
    alone = study(path, "--row", 1)
    assert alone.code == 6 and alone.err.startswith("error: qbara-")
    retried = study(path, "--retry-failed", "--no-report")
    assert retried.err.count("failed with exit code 6") == 1


def test_the_tables_hold_every_run(finished):
    report = finished / "out" / "report"
    lines = list(csv.DictReader((report / "results.csv").read_text().splitlines()))
    entries = json.loads((report / "results.json").read_text())
    assert len(lines) == len(entries) == COUNT
    for line, entry in zip(lines, entries, strict=True):
        assert (line["run"], line["status"], int(line["trainables"])) == (entry["run"], "done", entry["trainables"])
        assert float(line["tuned_loss"]) == pytest.approx(entry["tuned"]["loss"], abs=1e-6)
        assert len(entry["training_loss"]) == 2
    assert float(lines[0]["kept_total"]) == 1.0
    findings = json.loads((report / "findings.json").read_text())
    assert {finding["claim"] for finding in findings} == {
        "1",
        "2 (type)",
        "4 (type over depth)",
        "5 (equal discount)",
    }
    # From the table alone, by another way: claim 1's contrast.
    cost = {}
    for seed in ("0", "1"):
        own = {(line["preset"], line["group"]): float(line["tuned_loss"]) for line in lines if line["seed"] == seed}
        cost[seed] = own["rank_by_type", "attention"] - own["rank_by_type", "mlp"]
    assert findings[0]["estimate"]["per_seed"] == pytest.approx(list(cost.values()), abs=2e-6)


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.images: list[str] = []
        self.others: list[str] = []

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if tag == "img" and name == "src":
                self.images.append(value)
            elif name in ("src", "href"):
                self.others.append(value)


def test_the_page_needs_no_other_file(finished):
    text = (finished / "out" / "report" / "report.html").read_text()
    links = _Links()
    links.feed(text)
    figures = {path.stem for path in (finished / "out" / "report" / "figures").glob("*.svg")}
    assert figures == {"rank_by_type", "rank_by_depth", "balance_by_type", "equal_discount", "loss_curves"}
    assert len(links.images) == len(figures) and all(
        src.startswith("data:image/svg+xml;base64,") for src in links.images
    )
    assert links.others == [] and "url(" not in text
    for sentence in (finding["contrast"] for finding in json.loads(_findings(finished))):
        assert sentence in text


def _findings(finished: Path) -> str:
    return (finished / "out" / "report" / "findings.json").read_text()


def test_every_run_is_in_tensorboards_hparams(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = expand(load_study(finished / "study.yaml"))
    for row in rows[:2]:
        events = EventAccumulator(str(finished / "out" / "hparams" / row.name)).Reload()
        loss = events.Scalars("result/held_out_loss")[0].value
        assert loss == pytest.approx(read_result(row.folder).tuned["loss"], rel=1e-6)
    assert len(list((finished / "out" / "hparams").iterdir())) == COUNT


def test_a_suggestion_keeps_the_budget_and_can_be_trained(finished, study, shell):
    rows = expand(load_study(finished / "study.yaml"))
    full = rows[0].trainables
    budget = full * 7 // 10
    found = study(finished / "study.yaml", "--suggest", budget)
    assert found.code == 0, found.err
    target = finished / "out" / "suggested-qbara.yaml"
    assert found.out.startswith(f"{target}: ") and "effects added up" in found.out
    suggested = load_config(target)
    plan = json.loads(shell("validate", target, "--json")[1])
    assert plan["trainable_parameters"] <= budget < full
    assert suggested.method.schedule
    assert study(finished / "study.yaml", "--suggest", 10).err.startswith("error: --suggest: got 10, the smallest ")


def test_the_plan_lists_every_run_with_its_count(finished, study):
    found = study(finished / "study.yaml", "--plan")
    rows = expand(load_study(finished / "study.yaml"))
    for row in rows:
        line = next(line for line in found.out.splitlines() if row.name in line)
        assert f"{row.trainables:,}" in line and "done" in line
    assert f"{COUNT} runs, 0 to do" in found.out and "totals are equal (absolute cut)" in found.out


def test_ranks_do_a_run_together(tiny_llama, tmp_path):
    path = write_study(tmp_path, tiny_llama, presets=PRESETS[:1], seeds=[0], train={"per_device_train_batch_size": 2})
    with Command("study", path, "--no-report", ranks=2) as command:
        found = command.finish()
    assert found.code == 0, found.err
    assert found.err.count("held-out loss") == len(result_files(tmp_path)) == 3
    several = [read_result(row.folder).history for row in expand(load_study(path))]
    shutil.rmtree(tmp_path / "out")
    run_rows(expand(load_study(path)), [0, 1, 2], retry_failed=False)
    alone = [read_result(row.folder).history for row in expand(load_study(path))]
    assert several == [pytest.approx(history, rel=1e-5) for history in alone]
