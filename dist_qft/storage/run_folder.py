"""Files of a run's folder that more than one part reads."""

import json
from pathlib import Path
from typing import Any

SUMMARY_FILE = "summary.json"  # the run in figures, written when it has come to its end


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none that can be read."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def result_step(folder: Path, last: int) -> int:
    """The step whose trainables are the result of the run in a folder, whose newest checkpoint is that of step `last`.

    It is `last`, unless the summary of a run that ended there names an earlier one (`checkpoint.load_best_at_end`).
    """
    said = read_json_object(folder / SUMMARY_FILE)
    found = said.get("result_step")
    return found if isinstance(found, int) and said.get("steps") == last else last
