"""The best evaluation and early stopping: what is compared, what is counted, what a resume may change."""

import json

import numpy as np
import pytest

from dist_qft.config.schema import EvaluationConfig, RunConfig
from dist_qft.data.dataset import TokenDataset
from dist_qft.data.tokens import TokenSequence
from dist_qft.errors import UserError
from dist_qft.storage.trainer_state import BaseEvaluation, TrainerState
from dist_qft.training.best_evaluation import (
    compare,
    continue_evaluations,
    has_waited_enough,
    is_better,
    require_metric,
    why_stopped,
)
from dist_qft.tuned_model.held_out import HeldOut


@pytest.mark.parametrize(
    ("settings", "best", "better"),
    [
        ({}, None, True),
        ({}, 1.1, True),
        ({}, 1.0, False),
        ({}, 0.9, False),
        ({"early_stopping_threshold": 0.2}, 1.1, False),
        ({"metric": "accuracy"}, 0.7, True),
        ({"metric": "accuracy"}, 0.8, False),
        ({"metric": "accuracy", "early_stopping_threshold": 0.2}, 0.7, False),
    ],
)
def test_less_loss_or_more_of_a_metric_by_more_than_the_threshold(settings, best, better):
    held_out = HeldOut(loss=1.0, tokens=3, metrics={"accuracy": 0.8})
    assert is_better(held_out, best, EvaluationConfig(**settings)) is better


def labelled(*labels: float) -> TokenDataset:
    sequences = [TokenSequence(np.array([1, 2], dtype=np.int32), np.array([False, True]), label) for label in labels]
    return TokenDataset.from_sequences(sequences, 0, None, {})


@pytest.mark.parametrize(
    ("task", "metric"),
    [
        ({"name": "kto"}, "rewards/margins"),
        ({"name": "classification", "labels": ["no", "yes"]}, "matthews"),
        ({"name": "regression"}, "pearson"),
    ],
    ids=lambda value: value if isinstance(value, str) else value["name"],
)
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_a_metric_that_labels_of_one_kind_never_give_is_refused(task, metric, label):
    config = config_with(task=task, metric=metric, early_stopping_patience=1)
    with pytest.raises(UserError, match=rf"^evaluation\.metric: got {metric}, must be loss: all 2 held-out"):
        require_metric(config, labelled(label, label))
    require_metric(config, labelled(1.0, 0.0))
    require_metric(config_with(task=task, early_stopping_patience=1), labelled(label, label))


def config_with(keep_best=False, task=(), **evaluation) -> RunConfig:
    tree = {"output_dir": "runs/a", "model": {"path": "base"}, "data": {"train": {"path": "a"}, "eval_samples": 5}}
    settings = {"eval_steps": 3, **evaluation}
    return RunConfig.model_validate(
        {**tree, "task": dict(task), "checkpoint": {"keep_best": keep_best}, "evaluation": settings}
    )


def evaluated(state: TrainerState, config: RunConfig, *steps: tuple[int, float], data: str = "d") -> TrainerState:
    """The state after evaluations, as (step, loss); their accuracy is a tenth of the loss."""
    state.config = config.model_dump(mode="json")
    for step, loss in steps:
        state.step = state.evaluated_step = step
        compare(state, HeldOut(loss, tokens=3, metrics={"accuracy": loss / 10}), config, data)
    return state


def test_evaluations_are_counted_whatever_the_steps_between_them():
    """One every 3 steps, then one every step: step 7 comes 4 steps after the best one, as the second evaluation."""
    state = evaluated(TrainerState(), config_with(early_stopping_patience=4), (3, 1.0), (6, 2.0))
    config = config_with(early_stopping_patience=4, eval_steps=1)
    assert continue_evaluations(state, config, "d") == []
    evaluated(state, config, (7, 2.0))
    assert (state.best_step, state.best_loss, state.comparison.waited, state.stopped_early) == (3, 1.0, 2, False)
    evaluated(state, config, (8, 2.0), (9, 2.0))
    assert state.comparison.waited == 4 and state.stopped_early
    evaluated(state, config, (10, 0.5))
    assert (state.best_step, state.comparison.waited, state.stopped_early) == (10, 0, False)


CLASSES = {"name": "classification", "labels": ["a", "b"]}


@pytest.mark.parametrize(
    ("then", "now", "data", "reason"),
    [
        ({"task": CLASSES}, {"task": CLASSES, "metric": "accuracy"}, "d", "evaluation.metric is now accuracy"),
        ({}, {}, "other", "the held-out data are others now"),
        (
            {"task": {"name": "orpo"}},
            {"task": {"name": "orpo", "beta": 0.5}},
            "other",
            "the held-out data are others now and the task has other settings now",
        ),
    ],
)
def test_figures_of_another_kind_are_not_compared_on_resume(then, now, data, reason):
    state = evaluated(TrainerState(), config_with(**then, early_stopping_patience=1), (3, 1.0), (6, 2.0))
    assert state.stopped_early
    config = config_with(**now, early_stopping_patience=1)
    assert continue_evaluations(state, config, data) == [
        f"the best evaluation so far, loss 1.0000 at step 3, no longer counts, because {reason}"
    ]
    assert not has_waited_enough(state, config.evaluation)
    evaluated(state, config, (9, 5.0), data=data)
    assert state.best_step == 9 and state.comparison.data_digest == data and not state.stopped_early
    assert continue_evaluations(state, config, data) == []


def test_figures_are_kept_while_nobody_compares():
    state = evaluated(TrainerState(), config_with(task=CLASSES, metric="accuracy", keep_best=True), (3, 1.0), (6, 0.5))
    before = (state.best_step, state.best_loss, state.comparison)
    assert continue_evaluations(state, config_with(task=CLASSES), "other") == []
    assert (state.best_step, state.best_loss, state.comparison) == before == (3, 0.1, before[2])
    assert before[2].waited == 1, "counted also without early stopping, which may be asked for later"


def test_a_best_checkpoint_that_was_never_kept_is_told(tmp_path):
    state = evaluated(TrainerState(), config_with(early_stopping_patience=3), (3, 1.0), (6, 2.0))
    config = config_with(keep_best=True).model_copy(update={"output_dir": str(tmp_path)})
    told = "warning: checkpoint.keep_best: the best evaluation so far was checkpoint-3's, which is not there"
    assert continue_evaluations(state, config, "d") == [told]
    (tmp_path / "checkpoint-3").mkdir()
    assert continue_evaluations(state, config, "d") == []


def test_the_base_is_evaluated_again_for_another_loss():
    """At equal answers of base and reference some losses depend on beta."""
    state = evaluated(TrainerState(), config_with(task={"name": "orpo"}))
    state.base_eval = BaseEvaluation("d", 1.0, 3)
    continue_evaluations(state, config_with(task={"name": "orpo"}), "d")
    assert state.base_eval is not None
    continue_evaluations(state, config_with(task={"name": "orpo", "beta": 0.5}), "d")
    assert state.base_eval is None


@pytest.mark.parametrize(
    ("now", "stopped", "notes"),
    [
        ({"early_stopping_patience": 2}, True, 0),
        ({"early_stopping_patience": 1}, True, 0),
        ({"early_stopping_patience": 3}, False, 0),
        ({}, False, 0),
        ({"early_stopping_patience": 2, "early_stopping_threshold": 0.5}, True, 0),
        ({"early_stopping_patience": 2, "early_stopping_threshold": 0.05}, False, 1),
    ],
)
def test_todays_patience_and_threshold_decide_whether_a_run_that_stopped_goes_on(now, stopped, notes):
    threshold = 0.1 if "early_stopping_patience" in now else 0.0
    then = config_with(early_stopping_patience=2, early_stopping_threshold=0.1)
    state = evaluated(TrainerState(), then, (3, 1.0), (6, 0.92), (9, 0.95))
    assert state.stopped_early
    config = config_with(**{"early_stopping_threshold": threshold, **now})
    assert len(continue_evaluations(state, config, "d")) == notes
    assert has_waited_enough(state, config.evaluation) is stopped
    assert (state.best_step, state.best_loss) == (3, 1.0)


def test_the_reason_of_an_early_end():
    config = config_with(early_stopping_patience=1)
    state = evaluated(TrainerState(), config, (3, 1.0), (6, 1.0))
    assert why_stopped(state) == "stopped early: the last evaluation was not better than loss 1.0000 at step 3"
    config = config_with(early_stopping_patience=2, early_stopping_threshold=0.1)
    state = evaluated(TrainerState(), config, (3, 1.0), (6, 0.95), (9, 0.95))
    assert why_stopped(state) == (
        "stopped early: none of the last 2 evaluations was better than loss 1.0000 at step 3 by more than 0.1"
    )


def test_a_checkpoint_without_the_terms_of_comparison_has_those_of_its_config():
    config = config_with(task=CLASSES, metric="accuracy", early_stopping_patience=4, early_stopping_threshold=0.05)
    state = evaluated(TrainerState(), config, (3, 2.0), (6, 1.0), (9, 1.0))
    state.base_eval = BaseEvaluation("d", 1.0, 3)
    old = json.loads(state.to_bytes())
    del old["comparison"]
    read = TrainerState.from_bytes(json.dumps(old).encode())
    assert read == state and read.comparison == state.comparison
    old["config"]["evaluation"] = {}
    read = TrainerState.from_bytes(json.dumps(old).encode())
    assert (read.comparison.metric, read.comparison.waited) == ("loss", 0)
