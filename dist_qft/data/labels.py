"""The number that is trained on, from a label as the data gives it."""

import math
import re
import reprlib
from typing import Any

from dist_qft.config.data_schema import TaskConfig
from dist_qft.data.records import RowError

_INTEGER = re.compile(r"\s*[0-9]{1,9}(?:\.0*)?\s*", re.ASCII)
_LARGEST = 3.4028235e38  # of float32, in which labels are kept


def label_value(task: TaskConfig, label: Any, where: str) -> float:
    """The position of a label in `task.labels`, or of a regression the number itself.

    A label may be given by name or by position, as an integer or as files of text and of floats write one; a name
    wins. A boolean is a label of that name, in any case of letters. RowError naming `where` and the allowed labels for
    anything else.
    """
    if task.name == "regression":
        return _number(label, where)
    if isinstance(label, bool):
        named = [index for index, name in enumerate(task.labels) if name.lower() == str(label).lower()]
        position = named[0] if len(named) == 1 else None
    else:
        position = integer(label)
        for name in (str(label), str(position)):  # 1.0 is the name "1" before it is a position
            if name in task.labels:
                return float(task.labels.index(name))
    if position is not None and 0 <= position < len(task.labels):
        return float(position)
    allowed = f"{', '.join(task.labels)}, or a position from 0 to {len(task.labels) - 1}"
    raise RowError(f"{where}: label: got {reprlib.repr(label)}, must be one of task.labels: {allowed}")


def verdict(label: Any) -> bool | None:
    """The verdict that a label is: a boolean, its name, 1 or 0; None if it is something else."""
    if isinstance(label, bool):
        return label
    named = {"true": True, "false": False}.get(label.strip().lower()) if isinstance(label, str) else None
    number = integer(label)
    return named if named is not None or number not in (0, 1) else bool(number)


def integer(label: Any) -> int | None:
    """The integer that a label is, or that it writes in digits or as a float; None if it is none."""
    if isinstance(label, str) and _INTEGER.fullmatch(label):
        label = float(label)
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    return label if type(label) is int else None


def _number(label: Any, where: str) -> float:
    try:
        value = math.nan if isinstance(label, bool) else float(label)  # csv files hold numbers as text
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not abs(value) <= _LARGEST:  # NaN, too
        raise RowError(f"{where}: label: got {reprlib.repr(label)}, must be a finite number of float32 for regression")
    return value
