"""Tasks of lm-evaluation-harness: found by name, loaded, and asked of a model, on every rank alike."""

import datetime
import logging
import math
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from dist_qft.base_model.skeleton import BaseModel
from dist_qft.errors import DistQFTError, SetupError, UserError

Figures = dict[str, dict[str, float]]  # task -> metric -> value


@dataclass(frozen=True)
class TaskRequest:
    """The tasks and how they are asked; fields as the options of the verb."""

    tasks: tuple[str, ...]
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 8
    chat_template: bool = False


def require_tasks(request: TaskRequest) -> None:
    """Refuse names that are no tasks, before anything large is loaded.

    Raises:
        SetupError: the harness is not installed.
        UserError: a task is unknown, or a task file cannot be read.
    """
    if find_spec("lm_eval") is None:
        raise SetupError("lm-eval needs lm-evaluation-harness; pip install 'dist-qft[lm-eval]'")
    with _quiet(), _told(request):
        known = set(_manager(request.include_path).all_tasks)
    unknown = [task for task in request.tasks if task not in known]
    if unknown:
        where = f" and {request.include_path}" if request.include_path else ""
        raise UserError(f"--tasks: got '{unknown[0]}', must be a task of lm-evaluation-harness{where}")


def measure(
    base: BaseModel,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    request: TaskRequest,
    today: datetime.date | None = None,
) -> Figures:
    """Every task's figures of the model as it stands, which is best in eval mode. Collective; the same on all ranks.

    The harness's own `simple_evaluate` returns figures on a node's first rank alone. So its two halves are called here:
    the tasks are loaded and given the seeds that it gives them, then each rank evaluates as if it were the only one.

    Args:
        today: the date for chat templates that print it (`data.date`); None takes the day of this call.

    Raises:
        UserError: a task is unknown, or its data cannot be had.
    """
    require_tasks(request)
    from lm_eval.evaluator import evaluate

    from dist_qft.harness.model import TunedLM

    model = TunedLM(base, tokenizer, request.batch_size, device=device, today=today)
    with _quiet(), _told(request, at_work=lambda: model.asked):
        results = evaluate(
            lm=model,
            task_dict=_loaded(request),
            limit=request.limit,
            log_samples=False,
            bootstrap_iters=0,
            apply_chat_template=request.chat_template,
            fewshot_as_multiturn=True,
        )
    return {task: _metrics(values) for task, values in results["results"].items()}


# Thousands of files are read for it.
@lru_cache(maxsize=1)
def _manager(include_path: str | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def _loaded(request: TaskRequest) -> Any:
    """The tasks with their data, examples and random choices as `simple_evaluate` of the harness sets them."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    loaded = _manager(request.include_path).load(list(request.tasks))
    for task in loaded["tasks"].values():
        number = task.get_config("num_fewshot")
        if number != 0:  # a task's own 0 stays: its questions are not to have examples
            asked = request.num_fewshot
            task.set_config("num_fewshot", (number or 0) if asked is None else asked)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    return loaded


@contextmanager
def _told(request: TaskRequest, at_work: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Context in which an error of a task or its data becomes one line.

    Args:
        at_work: True once the tasks and their questions are there: later errors are the model's, and stay as they are.
    """
    try:
        yield
    except (DistQFTError, MemoryError):
        raise
    except Exception as error:
        if at_work():
            raise
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--tasks: {', '.join(request.tasks)}: lm-evaluation-harness says: {first}") from error


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """The figures of a task: "acc,none" is "acc" with no filter."""
    numbers = {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
    return {name: value for name, value in numbers.items() if "_stderr" not in name and name != "sample_len"}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep standard output for the result; the harness's own lines and bars go to standard error."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with redirect_stdout(sys.stderr):
        yield
