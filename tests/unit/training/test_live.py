"""The display of a run on a real (pseudo) terminal, and its parts."""

import pty
import re

import pytest
from rich.console import Console

from dist_qft.training.live import LiveDisplay, sparkline, speed_and_memory
from tests.support.terminals import shown_on

FIGURES = {
    "train/loss": 2.46134,
    "train/learning_rate": 7.6e-5,
    "train/target_tokens_per_second": 1283.4,
    "time/step(s)": 3.61,
    "time/gather(s)": 1.2,
    "memory/rank0(MiB)": 700.0,
    "memory/rank10(MiB)": 1536.0,
}


def test_a_terminal_shows_bar_losses_speed_and_memory_below_what_is_printed():
    reader, writer = pty.openpty()
    with open(writer, "w", encoding="utf-8") as terminal:
        console = Console(file=terminal, width=100, highlight=False)
        assert console.is_terminal
        display = LiveDisplay(console, total_steps=20, first_step=4)
        display.start()
        display.record({**FIGURES, "train/loss": 3.0})
        display.record(FIGURES)
        display.record({"eval/loss": 2.5012})
        console.print("checkpoint  runs/a/checkpoint-5")
        display.advance(5)
        display.stop()
        display.stop()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown_on(reader))
    assert "checkpoint  runs/a/checkpoint-5" in text
    last = text[text.rindex("train") :].split("\r\n")
    assert "5/20" in last[0] and "left" in last[0]
    assert last[1].split("   ") == ["loss 2.4613 █▁", "held-out 2.5012", "lr 7.60e-05"]
    assert last[2].split("   ") == ["1,283 target tok/s", "3.61 s/step", "gathers 33%", "memory 1.50 GiB (rank 10)"]


@pytest.mark.parametrize(
    ("values", "drawn"),
    [([], ""), ([1.0], ""), ([1.0, 1.0], "▁▁"), ([0.0, 7.0], "▁█"), ([0.0, 3.5, 7.0, 1.0], "▁▅█▂")],
)
def test_a_sparkline_runs_from_the_lowest_to_the_highest(values, drawn):
    assert sparkline(values) == drawn


def test_nothing_is_said_that_is_not_known():
    assert speed_and_memory({}) == []
    assert speed_and_memory({"time/step(s)": 1.0, "time/gather(s)": 0.001}) == []
