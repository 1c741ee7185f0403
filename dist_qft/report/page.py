"""A run as one HTML page: losses, answers, memory, traffic, time, the merge, and what to type next."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import Any

from dist_qft.config.check import merge_obstacle
from dist_qft.config.load import CONFIG_FILE
from dist_qft.errors import DistQFTError
from dist_qft.pages import render
from dist_qft.pages.chart import Curve, line_chart
from dist_qft.plan import make_plan
from dist_qft.report.records import RunRecords
from dist_qft.storage.atomic import write_text
from dist_qft.storage.home import without_home
from dist_qft.trackers.kinds import TENSORBOARD, chosen
from dist_qft.training.event_files import EVENTS_FOLDER

REPORT_FILE = "report.html"

_MIB = 2**20
# The parts of a step under their tags. Gathers happen while the step computes, so they are a part of that time.
_TIMES = (
    ("computing and gathering", "time/compute(s)"),
    ("of it, waiting for gathers", "time/gather(s)"),
    ("reducing gradients", "time/reduce(s)"),
    ("making batches", "time/data(s)"),
    ("the whole step", "time/step(s)"),
)


def write_report(run: RunRecords) -> Path:
    """Write the page into the run's folder and return its path. Raises SetupError if it cannot be written."""
    path = run.folder / REPORT_FILE
    write_text(path, make_page(run))
    return path


def make_page(run: RunRecords) -> str:
    """The page's HTML; it depends on the run's files, and on the home folder, of which it shows `~`."""
    return render(
        __package__,
        "page.html.jinja",
        title=run.folder.resolve().name,
        model=without_home(run.config.model.path),
        method=run.config.method.name,
        status=_status(run),
        cards=list(_cards(run)),
        charts=[chart for chart in _charts(run) if chart["svg"]],
        answers=run.answers(),
        times=list(_times(run)),
        memory=_memory(run),
        traffic=_traffic(run),
        checks=sum(value for _, value in run.curve("replicas/digest_checked")),
        merges=[(place.name, certificate) for place, certificate in run.certificates],
        next_steps=without_home(list(next_steps(run))),
        config=without_home((run.folder / CONFIG_FILE).read_text(encoding="utf-8")),
        versions=versions if isinstance(versions := run.summary.get("versions"), dict) else {},
    )


def _status(run: RunRecords) -> str:
    done = int(run.steps[-1]["step"]) if run.steps else 0
    if not run.summary:
        return f"not finished: {done} steps are recorded"
    ranks, steps, engine = (run.summary.get(key, "?") for key in ("world_size", "steps", "engine"))
    return f"finished: {steps} steps on {ranks} {'rank' if ranks == 1 else 'ranks'} ({engine})"


def _cards(run: RunRecords) -> Iterator[tuple[str, str]]:
    """The few figures one looks for first: value and words."""
    unit = run.config.task.loss_unit
    measured = [run.figure("base_eval_loss"), run.figure("tuned_eval_loss")]  # of the run's result
    if None in measured:
        measured = [loss for _, loss in [*run.curve("base/loss")[-1:], *run.curve("eval/loss")[-1:]]]
    if measured:
        yield " → ".join(f"{loss:.4f}" for loss in measured), f"held-out loss, base → tuned ({unit})"
    trained = run.curve("train/loss")
    if trained and trained[-1][0] == run.steps[-1]["step"]:
        yield f"{trained[-1][1]:.4f}", "training loss of the last step"
    device = run.figure("peak_device_bytes")
    figures: tuple[tuple[float | None, Callable[[float], str], str], ...] = (
        (run.figure("trainable_parameters"), "{:,}".format, "trainable parameters"),
        (run.figure("base_bytes_per_rank"), _mebibytes(1), "base on the fullest rank"),
        (device or None, _mebibytes(0), "peak memory of the fullest rank"),
        (None if device else run.figure("peak_rss_bytes"), _mebibytes(0), "peak memory of the fullest rank (process)"),
        (run.figure("tokens_per_second"), "{:,.0f}".format, _speed_unit(run)),
        (run.figure("seconds"), _duration, "from the first line to the summary"),
    )
    yield from ((shown(value), words) for value, shown, words in figures if value is not None)


def _mebibytes(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value / _MIB:,.{digits}f} MiB"


def _charts(run: RunRecords) -> Iterator[dict[str, Any]]:
    base = run.curve("base/loss")[-1:]  # of the data that are held out now
    held_out = [*base, *(point for point in run.curve("eval/loss") if not base or point[0] >= base[0][0])]
    loss = [Curve("training", run.curve("train/loss")), Curve("held-out", held_out)]
    unit = run.config.task.loss_unit
    yield {"title": "Loss", "svg": line_chart([c for c in loss if c.points], "optimizer step", unit)}
    for title, tag, unit in (
        ("Learning rate", "train/learning_rate", "learning rate"),
        ("Gradient norm", "train/grad_norm", "L2 norm before clipping"),
        ("Speed", "train/target_tokens_per_second", _speed_unit(run)),
    ):
        yield {"title": title, "svg": line_chart([Curve(title, run.curve(tag))], "optimizer step", unit)}


def _speed_unit(run: RunRecords) -> str:
    return "labelled texts per second" if run.config.task.predicts_labels else "target tokens per second"


def _times(run: RunRecords) -> Iterator[dict[str, Any]]:
    """The mean of each part of a step, and its share of the whole in percent."""
    whole = run.mean("time/step(s)")
    for label, tag in _TIMES:
        seconds = run.mean(tag)
        if seconds is not None and whole:
            yield {"label": label, "seconds": f"{seconds:.4g}", "share": 100 * min(seconds / whole, 1.0)}


def _memory(run: RunRecords) -> list[dict[str, Any]]:
    """The largest logged memory of each rank, with its share of the largest in percent."""
    tags = sorted(
        {tag for line in run.steps for tag in line if tag.startswith("memory/rank")}, key=lambda t: (len(t), t)
    )
    most = {tag: max((value for _, value in run.curve(tag)), default=0.0) for tag in tags}
    largest = max(most.values(), default=0.0)
    names = {tag: tag.removeprefix("memory/").removesuffix("(MiB)").replace("rank", "rank ") for tag in tags}
    return [
        {"rank": names[tag], "mebibytes": f"{value:,.0f}", "share": 100 * value / largest}
        for tag, value in most.items()
        if largest
    ]


def _traffic(run: RunRecords) -> list[dict[str, str]]:
    """Bytes per step and rank, as measured and as planned; the plan is missing if the base is not at hand."""
    rows = (
        ("base gathered", "gathered", run.figure("gather_bytes_per_step")),
        ("gradients reduced", "reduced", run.figure("reduce_bytes_per_step")),
    )
    ranks = run.figure("world_size")
    planned: dict[str, int] = {}
    if isinstance(ranks, int) and ranks > 0:
        with suppress(DistQFTError):
            plan = make_plan(run.config, ranks)
            planned = {"gathered": plan.gather_bytes_per_step, "reduced": plan.reduce_bytes_per_step}
    return [
        {"what": label, "measured": f"{measured:,}", "planned": f"{planned[key]:,}" if planned else ""}
        for label, key, measured in rows
        if measured is not None
    ]


def next_steps(run: RunRecords) -> Iterator[tuple[str, str]]:
    """The likely next wishes, and the command for each."""
    folder = quote(str(run.folder))
    if not run.summary:
        yield "go on with training", f"dist-qft train {quote(str(run.folder / CONFIG_FILE))} --resume auto"
    if run.checkpoints:
        yield "evaluate the newest checkpoint", f"dist-qft eval {folder}"
        if not run.config.task.predicts_labels:
            yield "talk to the model", f"dist-qft chat {folder}"
        if merge_obstacle(run.config) is None:
            yield "write a model of its own (or --to gguf, quantized, peft)", f"dist-qft merge {folder} --to dense"
    for _, certificate in run.certificates:
        yield (
            "check a merged result against its certificate",
            f"dist-qft verify {quote(str(run.folder / Path(certificate.result.path).name))}",
        )
    if TENSORBOARD in chosen(run.config.train.report_to):
        yield "look at the curves live", f"tensorboard --logdir {quote(str(run.folder / EVENTS_FOLDER))}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (seconds, "s")]
    first = next((i for i, (number, _) in enumerate(parts) if number), 2)
    return " ".join(f"{number} {unit}" for number, unit in parts[first : first + 2])
