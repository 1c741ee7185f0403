"""The display of a run on a terminal: a bar, the course of the loss, speed, time left and memory."""

from collections import deque
from collections.abc import Mapping, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 32  # losses that are drawn
_MEMORY = ("memory/rank", "(MiB)")


class LiveDisplay:
    """Three lines that stay below what a run prints, drawn four times a second while it trains.

    Args:
        console: of a terminal.
        total_steps, first_step: the end of the bar, and the steps that are done already.
    """

    def __init__(self, console: Console, total_steps: int, first_step: int) -> None:
        left = TimeRemainingColumn(elapsed_when_finished=False)
        columns = [BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), left]
        self._progress = Progress(TextColumn("train"), *columns, console=console)
        self._task = self._progress.add_task("train", total=total_steps, completed=first_step)
        self._losses: deque[float] = deque(maxlen=_WIDTH)
        self._figures: dict[str, float] = {}
        self._plain = (console.encoding or "").lower().replace("-", "") != "utf8"
        self._live = Live(self, console=console, refresh_per_second=4)

    def start(self) -> None:
        """Begin drawing."""
        self._live.start()

    def stop(self) -> None:
        """Draw once more, and leave the lines where they are; safe before `start`."""
        self._live.stop()

    def record(self, values: Mapping[str, float]) -> None:
        """Take figures under the names of `metrics.jsonl`."""
        self._figures.update(values)
        if "train/loss" in values:
            self._losses.append(values["train/loss"])

    def advance(self, step: int) -> None:
        """Move the bar to this many steps done."""
        self._progress.update(self._task, completed=step)

    def __rich__(self) -> RenderableType:
        """The lines as they are now."""
        found = self._figures
        course = "" if self._plain else sparkline(list(self._losses))
        learning = [
            (f"loss {found['train/loss']:.4f} {course}".rstrip(), "bold") if "train/loss" in found else None,
            (f"held-out {found['eval/loss']:.4f}", "green") if "eval/loss" in found else None,
            (f"lr {found['train/learning_rate']:.2e}", "") if "train/learning_rate" in found else None,
        ]
        running = [(text, "dim") for text in speed_and_memory(found)]
        lines = [_joined([part for part in learning if part]), _joined(running)]
        return Group(self._progress, *[line for line in lines if line])


def _joined(parts: Sequence[tuple[str, str]]) -> Text:
    line = Text(no_wrap=True, overflow="ellipsis")
    for index, part in enumerate(parts):
        line.append("   " if index else "").append(*part)
    return line


def speed_and_memory(found: Mapping[str, float]) -> list[str]:
    """Tokens per second, seconds per step, the share of them spent on gathers, and the memory of the fullest rank."""
    texts = []
    seconds = found.get("time/step(s)", 0.0)
    if "train/target_tokens_per_second" in found:
        texts += [f"{found['train/target_tokens_per_second']:,.0f} target tok/s", f"{seconds:.2f} s/step"]
    if seconds and (gathers := found.get("time/gather(s)", 0.0) / seconds) >= 0.01:
        texts.append(f"gathers {gathers:.0%}")
    start, end = _MEMORY
    memory = {key[len(start) : -len(end)]: value for key, value in found.items() if key.startswith(start)}
    if memory:
        rank = max(memory, key=lambda each: memory[each])
        texts.append(f"memory {memory[rank] / 1024:.2f} GiB (rank {rank})")
    return texts


def sparkline(values: Sequence[float]) -> str:
    """A character per value, its height between the lowest and the highest of them."""
    if len(values) < 2:
        return ""
    lowest, highest = min(values), max(values)
    scale = (len(_BARS) - 1) / (highest - lowest) if highest > lowest else 0.0
    return "".join(_BARS[round((value - lowest) * scale)] for value in values)
