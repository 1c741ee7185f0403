"""The report of a benchmark: the columns of its tables, the fields of its JSON, and what a failed side leaves."""

import json
from dataclasses import replace

import pytest

from dist_qft.bench.report import Comparison, Report, Side, append_report, compare, print_report
from dist_qft.errors import SetupError

SIDES = {
    "ours": Side("ours", {"tokens_per_second": 300.0, "training_peak_bytes": 3 * 2**20, "bound_bytes": 2e6}),
    "theirs": Side("theirs", {"tokens_per_second": 200.0, "training_peak_bytes": 6 * 2**20}),
    "broken": Side("broken", error="ValueError: no"),
}


@pytest.fixture
def report():
    comparisons = [
        compare(SIDES, "tokens_per_second", "ours", "theirs"),
        compare(SIDES, "training_peak_bytes", "ours", "theirs", 2 * 2**20),
        compare(SIDES, "tokens_per_second", "ours", "broken"),
    ]
    return Report("step", {"ranks": 2}, list(SIDES.values()), comparisons, ["a note"])


def test_comparisons_are_ours_over_theirs_in_the_tables_unit():
    speed = compare(SIDES, "tokens_per_second", "ours", "theirs")
    assert (speed.ours, speed.peer, speed.ratio) == (300.0, 200.0, 1.5)
    memory = compare(SIDES, "training_peak_bytes", "ours", "theirs", 2 * 2**20)
    assert (memory.ours, memory.peer, memory.ratio, memory.bound) == (3.0, 6.0, 0.5, 2.0)


def test_without_a_peer_the_ratio_is_to_the_bound():
    assert Comparison("wire MB", 10.2, bound=10.0).ratio == pytest.approx(1.02)


def test_a_side_that_failed_has_no_figure_and_no_ratio():
    found = compare(SIDES, "tokens_per_second", "ours", "broken")
    assert (found.peer, found.ratio) == (None, None)


def test_tables(report, capsys):
    print_report(report)
    out = capsys.readouterr().out
    for heading in ("side", "tokens/s", "training peak MiB", "what", "ours", "peer", "ratio", "bound", "peer's name"):
        assert heading in out
    assert "broken did not run: ValueError: no\n" in out
    assert "a note\n" in out


def test_json_lines_are_appended(report, tmp_path):
    path = tmp_path / "results.jsonl"
    append_report(report, path)
    append_report(report, path)
    first, second = map(json.loads, path.read_text().splitlines())
    assert set(first) == {"benchmark", "date", "machine", "versions", "settings", "sides", "comparisons", "notes"}
    assert first["benchmark"] == "step" and first["settings"] == {"ranks": 2}
    assert {"torch", "python"} <= set(first["versions"])
    assert {"cpu", "cores", "memory_gib", "gpu"} <= set(first["machine"])
    assert set(first["comparisons"][0]) == {"what", "ours", "peer", "peer_name", "ratio", "bound"}
    assert first["sides"][2] == {"name": "broken", "metrics": {}, "error": "ValueError: no"}
    assert first["comparisons"] == second["comparisons"]


def test_the_home_folder_is_not_in_the_json(report, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    error = "OSError: no /home/somebody/a, /home/somebody2, /mnt/home/somebody/a"
    append_report(replace(report, settings={"model": "/home/somebody/models/a"}, notes=[error]), tmp_path / "a.jsonl")
    written = json.loads((tmp_path / "a.jsonl").read_text())
    assert written["settings"] == {"model": "~/models/a"}
    assert written["notes"] == ["OSError: no ~/a, /home/somebody2, /mnt/home/somebody/a"]
    for home in ("/", ""):
        monkeypatch.setenv("HOME", home)
        append_report(replace(report, notes=["/a /b"]), tmp_path / "b.jsonl")
        assert json.loads((tmp_path / "b.jsonl").read_text().splitlines()[-1])["notes"] == ["/a /b"]


def test_a_file_that_cannot_be_written_is_one_line(report, tmp_path):
    with pytest.raises(SetupError, match=r"--json .*: cannot write: Is a directory"):
        append_report(report, tmp_path)
