"""Labels as JSON, CSV and tables of floats write them: which of the task's labels they are."""

import pytest

from dist_qft.config.data_schema import TaskConfig
from dist_qft.data.labels import label_value, verdict
from dist_qft.errors import UserError

WORDS, DIGITS, ANSWERS = ["neg", "pos"], ["1", "0"], ["False", "true"]


@pytest.mark.parametrize(
    ("labels", "label", "position"),
    [
        (WORDS, "pos", 1),
        (WORDS, 1, 1),
        (WORDS, "1", 1),
        (WORDS, " 0 ", 0),
        (WORDS, 1.0, 1),
        (WORDS, "1.0", 1),
        # A name wins, however the data write the number.
        (DIGITS, "1", 0),
        (DIGITS, 1, 0),
        (DIGITS, 1.0, 0),
        (DIGITS, "0.0", 1),
        (ANSWERS, True, 1),
        (ANSWERS, False, 0),
        (ANSWERS, "true", 1),
    ],
)
def test_a_label_is_a_name_or_a_position(labels, label, position):
    assert label_value(TaskConfig(name="classification", labels=labels), label, "d.csv:2") == position


@pytest.mark.parametrize(
    ("labels", "label"),
    [
        (WORDS, "2"),
        (WORDS, -1),
        (WORDS, "-1"),
        (WORDS, 0.5),
        (WORDS, "0.5"),
        (WORDS, True),
        (WORDS, "\u0661"),  # a digit of another script
        (WORDS, float("nan")),
        (WORDS, float("inf")),
        (WORDS, [1]),
        (WORDS, ""),
        (["true", "True"], True),
    ],
)
def test_what_is_neither_is_refused(labels, label):
    with pytest.raises(UserError, match=r"^d.csv:2: label: got .*, must be one of task.labels: .* from 0 to 1$"):
        label_value(TaskConfig(name="classification", labels=labels), label, "d.csv:2")


@pytest.mark.parametrize(
    ("label", "wanted"),
    [
        *((each, True) for each in (True, 1, 1.0, "true", "True", "1", "1.0")),
        *((each, False) for each in (False, 0, 0.0, "FALSE", "0", "0.0")),
        *((each, None) for each in ("good", 2, 0.5, "", [], "01x", "-1")),
    ],
)
def test_a_verdict_is_a_boolean_however_it_is_written(label, wanted):
    assert verdict(label) is wanted
