"""Single bits flipped in every file that a run leaves and needs: seen, repaired, or without any effect.

A command that uses the file runs after each flip. It may refuse, or rebuild what was damaged; if it ends well its
result must be that of the undamaged files. A wrong result with exit code 0 is a silent flip, which may not be. Files
that only people read (`FOR_PEOPLE`) carry no digest: the page that `report` makes of them may be another.
"""

import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from dist_qft.config.load import CONFIG_FILE
from dist_qft.merge.certificate import CARD
from dist_qft.report.page import REPORT_FILE
from dist_qft.storage.checkpoint import ADAPTER_MODEL, TRAINER_STATE
from dist_qft.training.metrics_file import METRICS_FILE
from dist_qft.training.summary import SUMMARY_FILE
from tests.whole.breaking.attempts import Breaker, Budget, Ended, Tally, fault_in
from tests.whole.breaking.children import command
from tests.whole.breaking.mutations import flip_bit
from tests.whole.breaking.workshop import Workshop

MERGED = "merged-dense"
# A figure in these is as good as the disk that it lies on: no command computes with them (docs/faults.md).
FOR_PEOPLE = (SUMMARY_FILE, CONFIG_FILE, CARD, REPORT_FILE)
_SLACK_BYTES = 1 << 30


def flipper(shop: Workshop) -> Breaker:
    """Attempts on copies of the finished run and its base."""
    expected: dict[str, object] = {}

    def attempt_all(budget: Budget) -> Tally:
        tally = Tally("flipped bit")
        for number, chance in budget.each():
            with tempfile.TemporaryDirectory(prefix="breaking-") as folder:
                name, outcome, reason = _attempt(shop, Path(folder), chance, expected)
            tally.outcomes[outcome] += 1
            if reason is not None:
                tally.fail(f"{budget.seed}:{number} ({name})", reason)
        return tally

    return attempt_all


def _attempt(
    shop: Workshop, folder: Path, chance: random.Random, expected: dict[str, object]
) -> tuple[str, str, str | None]:
    """The file that was flipped, the outcome in words, and why it is a failure, if it is one."""
    run, model = (Path(shutil.copytree(source, folder / source.name)) for source in (shop.run, shop.model))
    files = [path for path in sorted([*run.rglob("*"), *model.rglob("*")]) if _counts(path)]
    file = chance.choice(files)
    use = _use_of(file, run, chance)
    if use not in expected:
        ended = USES[use](shop, run, model)
        assert ended.code == 0, ended.output
        expected[use] = RESULTS[use](run, ended)
        shutil.rmtree(run)
        shutil.copytree(shop.run, run)
    before = file.read_bytes()
    file.write_bytes(flip_bit(before, chance))
    must_tell = file.name == METRICS_FILE and file.read_bytes()[: _saved_bytes(run)] != before[: _saved_bytes(run)]
    ended = USES[use](shop, run, model)
    name = f"{file.relative_to(folder)}, {use}"
    if reason := fault_in(ended, shop.peak_bytes + _SLACK_BYTES):
        return name, "ended badly", reason
    if ended.code != 0:
        return name, "refused", None
    if must_tell and METRICS_FILE not in ended.output:
        return name, "silent", "another history without a word"
    if RESULTS[use](run, ended) == expected[use]:
        return name, "same result", None
    return name, "silent", "another result with code 0"


def _saved_bytes(run: Path) -> int:
    """Bytes of the history that the last checkpoint knows."""
    return json.loads((run / "checkpoint-6" / TRAINER_STATE).read_bytes())["metrics_bytes"]


def _counts(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0 and not path.name.endswith(".lock")


def _for_people(file: Path) -> bool:
    return file.name in FOR_PEOPLE or "tfevents" in file.name or "crash" in file.parts


def _use_of(file: Path, run: Path, chance: random.Random) -> str:
    """A command that reads this file."""
    if _for_people(file):
        return "report"
    if MERGED in file.parts:
        return "verify"
    if file.name == METRICS_FILE:
        return "resume"
    if run in file.parents and file.parent.name.startswith("checkpoint-") and file.parent.name != "checkpoint-6":
        return "resume"
    return chance.choice(("eval", "resume", "merge"))


def _evaluate(shop: Workshop, run: Path, model: Path) -> Ended:
    return command("eval", run, f"model.path={model}", "--json")


def _resume(shop: Workshop, run: Path, model: Path) -> Ended:
    changes = (f"output_dir={run}", f"model.path={model}", "train.max_steps=7", "merge.at_end=null")
    return command("train", shop.config, *changes, "--resume", "auto")


def _merge(shop: Workshop, run: Path, model: Path) -> Ended:
    # The run's config names the base of the workshop, which is not the one that was flipped: the copy takes its place.
    aside = model.with_name("aside")
    (link := shop.model).rename(aside)
    try:
        link.symlink_to(model)
        return command("merge", run, "--to", "dense", "-o", run / "again")
    finally:
        link.unlink()
        aside.rename(link)


def _verify(shop: Workshop, run: Path, model: Path) -> Ended:
    return command("verify", run / MERGED)


def _report(shop: Workshop, run: Path, model: Path) -> Ended:
    return command("report", run)


def _printed(run: Path, ended: Ended) -> object:
    text = ended.output[ended.output.index("{") :] if "{" in ended.output else ended.output
    content = json.loads(text)
    return {name: content[name] for name in ("base", "tuned")}


def _trained(run: Path, ended: Ended) -> object:
    return hashlib.sha256((run / "checkpoint-7" / ADAPTER_MODEL).read_bytes()).hexdigest()


def _merged(run: Path, ended: Ended) -> object:
    # The files beside the weights are the base's own, whatever these say.
    return hashlib.sha256((run / "again" / "model.safetensors").read_bytes()).hexdigest()


def _verified(run: Path, ended: Ended) -> object:
    return ended.last_line


def _made(run: Path, ended: Ended) -> object:
    return (run / REPORT_FILE).is_file()


USES: dict[str, Callable[[Workshop, Path, Path], Ended]] = {
    "eval": _evaluate,
    "resume": _resume,
    "merge": _merge,
    "verify": _verify,
    "report": _report,
}
RESULTS: dict[str, Callable[[Path, Ended], object]] = {
    "eval": _printed,
    "resume": _trained,
    "merge": _merged,
    "verify": _verified,
    "report": _made,
}
