"""The program that runs one tracker's library: `python -m dist_qft.trackers.process NAME`.

The trainer starts it, sends one line of JSON for each record, and never waits for it. So a library that imports for
seconds, waits for a network, draws random numbers, changes signal handlers or crashes does nothing to the training.

    first line   {"folder", "name", "config", "resumed"}
    then         {"step", "figures": {...}} or {"step", "tag", "text"} or {"step", "results": {...}}
    at the end   {"end": finished, "seconds": limit}; an input that just ends is of a trainer that was killed

Answers on standard output are lines {"note": text}. Everything that the library prints goes to standard error.
"""

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_qft.storage.atomic import write_json
from dist_qft.trackers.libraries import LIBRARIES, Opening, Tracker, finite_or_nan
from dist_qft.trackers.secrets import without_secrets

FINISHED_SECONDS, STOPPED_SECONDS = 60.0, 10.0  # for a library to end its run, after a good end and after a bad one


def run_file(folder: Path, name: str) -> Path:
    """The file with the id under which a tracker knows the run."""
    return folder / f"{name}.json"


def main() -> None:
    # The trainer decides when to stop; its end shows as the end of the input.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def note(text: str) -> None:
        answers.write(json.dumps({"note": without_secrets(text)}) + "\n")
        answers.flush()

    name = sys.argv[1]
    try:
        tracker = _open(name, json.loads(sys.stdin.readline()), note)
        note(tracker.where)
    except Exception as error:
        traceback.print_exc()
        note(f"records nothing: {reason(error)}")
        return
    finished, seconds = _follow(tracker, note)
    _end_within(seconds)
    try:
        tracker.close(finished)
    except Exception as error:
        traceback.print_exc()
        note(f"did not end its run: {reason(error)}")


def _open(name: str, first: dict[str, Any], note: Callable[[str], None]) -> Tracker:
    folder = Path(first["folder"])
    known = _known_run(run_file(folder, name)) if first["resumed"] else None
    tracker = LIBRARIES[name](Opening(folder, first["name"], first["config"], known, note))
    write_json(run_file(folder, name), {"run_id": tracker.run_id})
    return tracker


def _known_run(path: Path) -> str | None:
    try:
        found = json.loads(path.read_bytes())["run_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


def _follow(tracker: Tracker, note: Callable[[str], None]) -> tuple[bool, float]:
    """Record every line until the end. Of all failures the first one is told.

    Returns True if the run has finished, and the seconds in which it must be closed.
    """
    failed = False
    for line in sys.stdin:
        if not line.endswith("\n"):  # half a record: the trainer was killed while it wrote
            break
        record = json.loads(line)
        if "end" in record:
            return record["end"], record["seconds"]
        try:
            _record(tracker, record)
        except Exception as error:
            traceback.print_exc()
            if not failed:
                failed = True
                note(f"could not record step {record['step']}: {reason(error)}; later ones are tried")
    return False, STOPPED_SECONDS


def _record(tracker: Tracker, record: dict[str, Any]) -> None:
    step = record["step"]
    if "text" in record:
        tracker.text(step, record["tag"], record["text"])
        return
    kind = "figures" if "figures" in record else "results"
    values = {tag: finite_or_nan(value) for tag, value in record[kind].items()}
    (tracker.figures if kind == "figures" else tracker.results)(step, values)


def reason(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _end_within(seconds: float) -> None:
    """End this process after so many seconds, whatever the library waits for."""
    timer = threading.Timer(seconds, lambda: os._exit(1))
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    main()
