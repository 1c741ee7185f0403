"""The look at a run's own files that `validate` takes: what is refused there, and what is left to the run."""

import json

import pytest

from dist_qft.config.data_schema import DataConfig
from dist_qft.data.first_rows import FIRST_ROWS, check_first_rows
from dist_qft.errors import UserError

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
ALPACA = {"instruction": "Say hi.", "output": "Hi"}


def data(tmp_path, rows, **settings) -> DataConfig:
    path = tmp_path / "my.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = {"path": str(path), **settings.pop("train", {})}
    return DataConfig.model_validate({"train": train, "eval_samples": 0, **settings})


@pytest.mark.parametrize(
    ("rows", "settings", "words"),
    [
        ([CHAT] * 3, {"train": {"format": "alpaca"}}, "my.jsonl:1: field 'instruction' is missing"),
        ([CHAT] * 3, {"eval_samples": 3}, "data.eval_samples: got 3, must be at most 2 of the 3 samples"),
        ([{"q": 1}], {}, "my.jsonl:1: the fields q fit no format"),
        ([CHAT, {"messages": "x"}], {}, "my.jsonl:2: "),
    ],
)
def test_what_a_run_would_refuse_is_refused(tmp_path, rows, settings, words):
    with pytest.raises(UserError) as refusal:
        check_first_rows(data(tmp_path, rows, **settings), "causal-lm")
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("rows", "settings", "task"),
    [
        ([CHAT] * 3, {"eval_samples": 2}, "causal-lm"),
        ([ALPACA] * 3, {}, "causal-lm"),
        ([CHAT] * FIRST_ROWS + [{"q": 1}], {}, "causal-lm"),  # beyond the first rows
        ([CHAT] * FIRST_ROWS, {"eval_samples": 1000}, "causal-lm"),  # there may be more
        ([CHAT, {"messages": "x"}], {"on_bad_row": "skip", "max_bad_rows": 0.5}, "causal-lm"),
        ([{"text": "a", "label": "b"}], {}, "classification"),
        ([{"chosen": "a b", "rejected": "a c", "prompt": "a"}], {}, "dpo"),
    ],
)
def test_what_fits_or_cannot_be_told_is_left_to_the_run(tmp_path, rows, settings, task):
    check_first_rows(data(tmp_path, rows, **settings), task)


def test_data_that_is_elsewhere_is_not_asked_for(tmp_path):
    for path in (str(tmp_path / "none.jsonl"), "owner/name", "stdlib-docs"):
        check_first_rows(DataConfig.model_validate({"train": {"path": path}}), "causal-lm")
