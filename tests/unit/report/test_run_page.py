"""The page of a run, from files as a run writes them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dist_qft.config.data_schema import TaskConfig
from dist_qft.config.load import load_config, save_config
from dist_qft.errors import UserError
from dist_qft.report.page import next_steps, write_report
from dist_qft.report.records import RunRecords
from dist_qft.training.summary import SummaryFigures

PROMPT = "What is <b>bold</b>?"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that is stopped after step 2; its base is not on this machine."""
    file = tmp_path / "given.yaml"
    file.write_text(
        f"output_dir: {tmp_path / 'run'}\nmodel: {{path: {tmp_path / 'gone.gguf'}}}\nmethod: {{name: qlora, rank: 4}}\n"
        f"train: {{max_steps: 3, global_batch_size: 2}}\nevaluation: {{prompts: ['{PROMPT}']}}\n"
        "data: {train: {path: stdlib-docs}}\n"
    )
    folder = tmp_path / "run"
    folder.mkdir()
    save_config(load_config(file), folder / "config.yaml")
    lines = [
        {"step": 0, "base/loss": 3.0},
        {"step": 0, "answer/base": f"{PROMPT}\n\n<script>alert(1)</script>"},
        {"step": 1, "train/loss": 2.5, "time/step(s)": 2.0, "time/compute(s)": 1.5, "memory/rank0(MiB)": 100.0},
        {"step": 2, "train/loss": None, "time/step(s)": 2.0, "time/compute(s)": 0.5, "memory/rank0(MiB)": 300.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "train')
    return folder


def test_a_stopped_run_has_a_page_that_says_how_to_go_on(run):
    page = write_report(RunRecords.read(run)).read_text()
    assert "not finished: 2 steps are recorded" in page
    assert f"dist-qft train {run / 'config.yaml'} --resume auto" in page
    assert "50 %" in page, "computing took 2 of 4 seconds"
    assert "300" in page and "planned" not in page


def test_the_home_folder_is_not_on_the_page(run, monkeypatch):
    monkeypatch.setenv("HOME", str(run.parent))
    page = write_report(RunRecords.read(run)).read_text()
    assert str(run.parent) not in page
    words = " ".join(page.split())  # YAML puts a long path on a line of its own
    assert "dist-qft train ~/run/config.yaml --resume auto" in words and "path: ~/gone.gguf" in words


def test_what_a_model_answers_is_text(run):
    page = write_report(RunRecords.read(run)).read_text()
    assert "<script>" not in page and "&lt;script&gt;alert(1)" in page
    assert "What is &lt;b&gt;bold" in page


@pytest.mark.parametrize(
    ("task", "unit"),
    [
        (TaskConfig(), "nats per target"),
        (TaskConfig(name="classification", labels=["a", "b"]), "nats per text"),
        (TaskConfig(name="regression"), "squared error"),
        (TaskConfig(name="dpo"), "DPO loss per pair"),
        (TaskConfig(name="orpo"), "ORPO loss per pair"),
        (TaskConfig(name="kto"), "KTO loss per answer"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_losses_have_the_unit_of_the_task(run, task, unit):
    records = RunRecords.read(run)
    page = write_report(replace(records, config=records.config.model_copy(update={"task": task}))).read_text()
    assert f"tuned ({unit})" in page and f">{unit}<" in page
    assert ("nats per" in page) == ("nats per" in unit)


@pytest.mark.parametrize(
    ("task", "merges"), [(TaskConfig(), True), (TaskConfig(name="classification", labels=["a", "b"]), False)]
)
def test_a_merge_is_offered_where_there_can_be_one(run, task, merges):
    records = RunRecords.read(run)
    checkpoints = [run / "checkpoint-2"]
    config = records.config.model_copy(update={"task": task})
    commands = [command for _, command in next_steps(replace(records, config=config, checkpoints=checkpoints))]
    assert (f"dist-qft merge {run} --to dense" in commands) == merges
    assert not any("|" in command for command in commands)


def test_bytes_that_are_no_text_cost_their_own_signs_alone(run):
    answer = json.dumps({"step": 2, "answer/tuned": f"{PROMPT}\n\nbold \u2028 or not"}, ensure_ascii=False).encode()
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    torn = [b'{"step": 1, "tr\xff\xfe\n', answer.replace(b"or not", b"\xe9t"), b"\n"]
    (run / "metrics.jsonl").write_bytes(b"".join([*lines[:-1], *torn]))
    records = RunRecords.read(run)
    assert [line["step"] for line in records.steps] == [1, 2]
    assert [each.tuned for each in records.answers()] == ["bold \u2028 \ufffdt"]
    write_report(records)


def test_a_finished_run_shows_its_figures_without_the_base(run):
    figures = dict.fromkeys(SummaryFigures.__dataclass_fields__, 0)
    figures |= {"steps": 3, "world_size": 2, "engine": "fsdp", "trainable_parameters": 12_345, "seconds": 4000.0}
    figures |= {
        "peak_rss_bytes": 2**20,
        "peak_device_bytes": None,
        "tokens_per_second": None,
        "versions": {"torch": "2"},
    }
    figures |= {"gather_bytes_per_step": 0, "reduce_bytes_per_step": 49_548}
    (run / "summary.json").write_text(json.dumps(figures))
    page = write_report(RunRecords.read(run)).read_text()
    assert all(text in page for text in ("finished: 3 steps on 2 ranks (fsdp)", "12,345", "1 h 6 min", "49,548"))
    assert "--resume" not in page


@pytest.mark.parametrize("spoil", [None, "words", [1], {"a": 1}, float("nan"), 10**400, -1, 0])
def test_figures_of_another_kind_are_left_out(run, spoil):
    figures = dict.fromkeys(SummaryFigures.__dataclass_fields__, 7)
    for name in figures:
        spoiled = {key: value for key, value in figures.items() if key != name}
        for summary in (spoiled, spoiled | {name: spoil}):
            (run / "summary.json").write_text(json.dumps(summary))
            assert "finished: " in write_report(RunRecords.read(run)).read_text()
    history = (run / "metrics.jsonl").read_text().splitlines()[:-1]
    for number, line in enumerate(history):
        for tag in json.loads(line):
            lines = [*history[:number], json.dumps(json.loads(line) | {tag: spoil}), *history[number + 1 :]]
            (run / "metrics.jsonl").write_text("\n".join(lines))
            write_report(RunRecords.read(run))


def test_the_same_files_give_the_same_page(run):
    assert write_report(RunRecords.read(run)).read_bytes() == write_report(RunRecords.read(run)).read_bytes()


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"config\.yaml"):
        RunRecords.read(tmp_path)


def test_held_out_losses_are_of_the_same_data(run):
    """After a resume with other data the base is measured again."""
    lines = [{"step": 1, "eval/loss": 9.0}, {"step": 2, "base/loss": 6.5}, {"step": 3, "eval/loss": 6.25}]
    file = run / "metrics.jsonl"
    whole = [line for line in file.read_text().splitlines() if line.endswith("}")]
    file.write_text("".join(line + "\n" for line in [*whole, *map(json.dumps, lines)]))
    page = write_report(RunRecords.read(run)).read_text()
    assert "6.5000 → 6.2500" in page
