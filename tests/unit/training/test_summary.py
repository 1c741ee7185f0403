"""`summary.json`: its keys are a contract, and it is JSON whatever happened."""

import json
import math

import pytest

from dist_qft.training.summary import SUMMARY_FILE, SummaryFigures, remove_other_summary, summarized_steps

FIGURES = SummaryFigures(
    run_id="first",
    method="qahira",
    engine="fsdp",
    world_size=2,
    steps=6,
    base_eval_loss=3.0,
    tuned_eval_loss=2.0,
    base_eval_metrics={},
    tuned_eval_metrics={"accuracy": 0.5},
    eval_tokens=10,
    final_train_loss=1.0,
    trainable_parameters=100,
    base_bytes_per_rank=1000,
    gather_bytes_per_step=None,
    reduce_bytes_per_step=400,
    tokens_per_second=math.inf,
    load_peak_rss_bytes=10**8,
    peak_rss_bytes=10**9,
    peak_device_bytes=None,
    seconds=1.5,
    base_fingerprint="ab",
)


def test_the_file_holds_every_field_and_is_strict_json(tmp_path):
    path = FIGURES.write(tmp_path)
    assert path == tmp_path / SUMMARY_FILE
    content = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert list(content) == list(SummaryFigures.__dataclass_fields__)
    assert content["tokens_per_second"] is None and content["tuned_eval_metrics"] == {"accuracy": 0.5}
    assert set(content["versions"]) == {"dist-qft", "torch", "transformers", "bitsandbytes"}
    assert summarized_steps(tmp_path, "first") == 6


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '"steps"', "null"])
def test_a_file_that_is_no_summary_summarizes_nothing(tmp_path, content):
    (tmp_path / SUMMARY_FILE).write_text(content)
    assert summarized_steps(tmp_path, "first") is None


def test_the_summary_of_another_run_is_none_of_this_one_and_goes_before_it_begins(tmp_path):
    def is_left(run_id: str | None, step: int) -> bool:
        FIGURES.write(tmp_path)
        remove_other_summary(tmp_path, run_id, step)
        return (tmp_path / SUMMARY_FILE).exists()

    assert is_left("first", 6) and is_left("first", 8), "of this run, which goes on"
    assert not is_left("first", 4), "of this run, which went back"
    assert not is_left("second", 6) and not is_left(None, 0)
    FIGURES.write(tmp_path)
    assert summarized_steps(tmp_path, "second") is None


def test_summaries_and_checkpoints_of_earlier_versions_fit_any(tmp_path):
    FIGURES.write(tmp_path)
    assert summarized_steps(tmp_path, "") == 6
    (tmp_path / SUMMARY_FILE).write_text('{"steps": 6}')
    assert summarized_steps(tmp_path, "second") == 6
