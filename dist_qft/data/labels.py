"""The number that is trained on, from a label as the data gives it."""

import math
import reprlib
from typing import Any

from dist_qft.config.data_schema import TaskConfig
from dist_qft.data.records import RowError

_LARGEST = 3.4028235e38  # of float32, in which labels are kept


def label_value(task: TaskConfig, label: Any, where: str) -> float:
    """The position of a label in `task.labels`, or of a regression the number itself.

    A label may be given by name or, as an integer, by position; a name wins. RowError naming `where` and the allowed
    labels for anything else.
    """
    if task.name == "regression":
        return _number(label, where)
    name = str(label)
    if not isinstance(label, bool) and name in task.labels:
        return float(task.labels.index(name))
    if type(label) is int and 0 <= label < len(task.labels):
        return float(label)
    allowed = f"{', '.join(task.labels)}, or a position from 0 to {len(task.labels) - 1}"
    raise RowError(f"{where}: label: got {reprlib.repr(label)}, must be one of task.labels: {allowed}")


def _number(label: Any, where: str) -> float:
    try:
        value = math.nan if isinstance(label, bool) else float(label)  # csv files hold numbers as text
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not abs(value) <= _LARGEST:  # NaN, too
        raise RowError(f"{where}: label: got {reprlib.repr(label)}, must be a finite number of float32 for regression")
    return value
