"""The best evaluation of a run, and early stopping: which evaluations are compared, and when the run ends.

Figures are compared only if they are of one metric, on the same held-out data, for the same task. A run may be resumed
with others; then the comparison begins anew.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dist_qft.config.schema import EvaluationConfig, RunConfig
from dist_qft.config.section import with_defaults
from dist_qft.data.dataset import TokenDataset
from dist_qft.errors import UserError
from dist_qft.storage.checkpoint import checkpoint_path
from dist_qft.storage.trainer_state import Comparison, TrainerState
from dist_qft.tuned_model.held_out import HeldOut

# Metrics that tell two kinds of held-out rows apart, or how numbers differ: of one kind they are missing or always 0.
_OF_SEVERAL_KINDS = {"kto": ("rewards/margins",), "classification": ("matthews",), "regression": ("pearson",)}


def require_metric(config: RunConfig, held_out: TokenDataset | None) -> None:
    """Refuse an `evaluation.metric` that the held-out data never give, as their labels are all the same. UserError."""
    metric = config.evaluation.metric
    if held_out is None or held_out.labels is None or metric not in _OF_SEVERAL_KINDS.get(config.task.name, ()):
        return
    if (held_out.labels == held_out.labels[0]).all():
        rows = "answers are rated" if config.task.name == "kto" else "rows are labelled"
        raise UserError(f"evaluation.metric: got {metric}, must be loss: all {len(held_out)} held-out {rows} alike")


def figure(held_out: HeldOut, metric: str) -> float:
    """The value of `evaluation.metric`."""
    return held_out.loss if metric == "loss" else held_out.metrics[metric]


def gain(held_out: HeldOut, best: float, metric: str) -> float:
    """The amount by which an evaluation is better than the figure `best`, negative if worse. Of loss less is better."""
    gained = figure(held_out, metric) - best
    return -gained if metric == "loss" else gained


def is_better(held_out: HeldOut, best: float | None, settings: EvaluationConfig) -> bool:
    """True if an evaluation beats the best figure so far by more than the threshold."""
    return best is None or gain(held_out, best, settings.metric) > settings.early_stopping_threshold


def compares(config: RunConfig) -> bool:
    """True if the config has a use for the best evaluation."""
    return config.checkpoint.keep_best or config.evaluation.early_stopping_patience is not None


def compare(state: TrainerState, held_out: HeldOut, config: RunConfig, data_digest: str) -> bool:
    """Count the evaluation of the state's step, and end the run early if it has waited long enough for a better one.

    Args:
        data_digest: of the held-out data.

    Returns:
        True if this evaluation is the best so far.
    """
    settings = config.evaluation
    better = is_better(held_out, state.best_loss, settings)
    waited = state.comparison.waited if state.comparison else 0
    if better:
        state.best_loss, state.best_step = figure(held_out, settings.metric), state.step
    state.comparison = Comparison(
        metric=settings.metric,
        data_digest=data_digest,
        task=config.task.model_dump(mode="json"),
        threshold=settings.early_stopping_threshold,
        waited=0 if better else waited + 1,
    )
    state.stopped_early = has_waited_enough(state, settings)
    return better


def has_waited_enough(state: TrainerState, settings: EvaluationConfig) -> bool:
    """True if the run is to end early: so many evaluations as today's patience asks for were no better."""
    patience, comparison = settings.early_stopping_patience, state.comparison
    return patience is not None and comparison is not None and comparison.waited >= patience


def why_stopped(state: TrainerState) -> str:
    """The reason of an early end, in one line."""
    assert state.comparison is not None and state.best_loss is not None, "a run that stopped has compared"
    waited, threshold = state.comparison.waited, state.comparison.threshold
    last = "the last evaluation was not" if waited == 1 else f"none of the last {waited} evaluations was"
    best = f"{state.comparison.metric} {state.best_loss:.4f} at step {state.best_step}"
    return f"stopped early: {last} better than {best}" + (f" by more than {threshold:g}" if threshold else "")


def continue_evaluations(state: TrainerState, config: RunConfig, data_digest: str) -> list[str]:
    """Drop from a resumed run's state what today's evaluations cannot be compared with; lines that say so.

    The figures of the base go where the task's settings, such as the loss, have changed: it is evaluated again.

    A threshold that fell leaves the best figure but not the count: the evaluations since then may have been better by
    more than the new one. A threshold that rose leaves both.
    """
    then, settings = state.comparison, config.evaluation
    if _is_another_task(state.config.get("task", {}), config):
        state.base_eval = None
    if then is None or state.best_loss is None or not compares(config):
        return []
    reasons = []
    if then.metric != settings.metric:
        reasons.append(f"evaluation.metric is now {settings.metric}")
    if then.data_digest and then.data_digest != data_digest:
        reasons.append("the held-out data are others now")
    if _is_another_task(then.task, config):
        reasons.append("the task has other settings now")
    if reasons:
        best = f"{then.metric} {state.best_loss:.4f} at step {state.best_step}"
        state.best_step, state.best_loss, state.comparison = 0, None, None
        return [f"the best evaluation so far, {best}, no longer counts, because {' and '.join(reasons)}"]
    notes = []
    if settings.early_stopping_threshold < then.threshold:
        state.comparison = replace(then, threshold=settings.early_stopping_threshold, waited=0)
        if then.waited:
            notes.append(
                f"evaluations without a better one are counted anew, {then.waited} so far: "
                f"evaluation.early_stopping_threshold fell from {then.threshold:g}"
            )
    kept = checkpoint_path(Path(config.output_dir), state.best_step)
    if config.checkpoint.keep_best and not kept.exists():
        notes.append(f"warning: checkpoint.keep_best: the best evaluation so far was {kept.name}'s, which is not there")
    return notes


def _is_another_task(stored: Mapping[str, Any], config: RunConfig) -> bool:
    return with_defaults(config.task, stored) != config.task.model_dump(mode="json")
