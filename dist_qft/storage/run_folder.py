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
