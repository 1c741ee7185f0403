"""The state of a run: the part of a checkpoint that is plain JSON, and the reading of its earlier forms.

Its size does not grow with the run: the history of the losses is `metrics.jsonl`, the state keeps a digest of it.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from dist_qft.storage.atomic import json_text

STATE_VERSION = 2  # 1 held the whole history and called rows samples

NonNegative = Annotated[int, Field(ge=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class BaseEvaluation:
    """Held-out loss of the bare base, which a resumed run need not measure again on the same data."""

    data_digest: str
    loss: Finite
    tokens: NonNegative
    metrics: dict[str, Finite] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """The terms on which evaluations are compared with the best one, and how many in a row were no better.

    Attributes:
        metric: `evaluation.metric` of the best figure.
        data_digest: of the held-out data that it was measured on; empty if unknown, which counts as the same.
        task: settings of the task, by key.
        threshold: `evaluation.early_stopping_threshold` that the waiting was counted with.
        waited: evaluations since the best one.
    """

    metric: str
    data_digest: str
    task: dict[str, Any]
    threshold: Finite
    waited: NonNegative


@dataclass
class TrainerState:
    """The state of a run. It has no RNG state: every random draw is a function of (seed, step, position).

    Attributes:
        version: of this form.
        run_id: names the run through all its starts; empty in checkpoints of version 1.
        rows_seen: rows of the data used so far, over all ranks. A row is a sample, or with packing several samples.
        data_chain: hash chain over the ids of all rows used so far, in order.
        history_digest: hash chain over loss, learning rate and gradient norm of every step so far; see `chain_step`.
        last_loss: training loss of the last step; None before the first.
        metrics_bytes: size of `metrics.jsonl` when this was written: lines behind it came later.
        metrics_digest: SHA-256 of the file up to there; empty in checkpoints of earlier versions.
        world_size: of the run that wrote it, for the record; any other may resume.
        base_eval: None if there is no held-out data.
        evaluated_step: the last step after which held-out loss was measured; a signal may have cut one short.
        best_step, best_loss: with `checkpoint.keep_best` or early stopping, the best evaluation so far and its figure,
            held-out loss or `evaluation.metric`; else 0 and None.
        comparison: what that figure is of; None as long as nothing was compared.
        stopped_early: the last evaluations were no better, so the run has ended before its last step.
        config: the resolved config.
    """

    version: Annotated[int, Field(ge=1, le=STATE_VERSION)] = STATE_VERSION
    run_id: str = ""
    step: NonNegative = 0
    rows_seen: NonNegative = 0
    data_digest: str = ""
    data_chain: str = ""
    history_digest: str = ""
    last_loss: Finite | None = None
    metrics_bytes: NonNegative = 0
    metrics_digest: str = ""
    world_size: Annotated[int, Field(ge=1)] = 1
    base_eval: BaseEvaluation | None = None
    evaluated_step: NonNegative = 0
    best_step: NonNegative = 0
    best_loss: Finite | None = None
    comparison: Comparison | None = None
    stopped_early: bool = False
    config: dict[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The content of `trainer_state.json`."""
        return json_text(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> "TrainerState":
        """Read any version.

        Raises:
            pydantic.ValidationError: the content is not a state.
        """
        values = TypeAdapter(dict[str, Any]).validate_json(content)
        if values.get("version", 1) == 1:
            values = _from_first_version(values)
        state = TypeAdapter(cls).validate_python(values)
        if state.comparison is None and state.best_loss is not None:
            state.comparison = _comparison_before(state)
        return state


@dataclass(frozen=True)
class _EvaluationSettings:
    """The settings of evaluations that decide what a best figure is of."""

    eval_steps: Annotated[int, Field(gt=0)] | None = None
    metric: str = "loss"
    early_stopping_threshold: Finite = 0.0


def _comparison_before(state: TrainerState) -> Comparison:
    """The comparison in a checkpoint of a version that did not store it: on the terms of the config beside it."""
    kind = dict[str, Any]
    sections = {name: TypeAdapter(kind).validate_python(state.config.get(name, {})) for name in ("evaluation", "task")}
    settings = TypeAdapter(_EvaluationSettings).validate_python(sections["evaluation"])
    since = max(0, state.evaluated_step - state.best_step)
    return Comparison(
        metric=settings.metric,
        data_digest=state.base_eval.data_digest if state.base_eval else "",
        task=sections["task"],
        threshold=settings.early_stopping_threshold,
        waited=since // settings.eval_steps if settings.eval_steps else 0,
    )


def chain_step(chain: str, step: int, loss: float, learning_rate: float, grad_norm: float) -> str:
    """Extend the hash chain over the history by one step (1-based). Equal chains mean equal bits in every number."""
    numbers = " ".join(float(number).hex() for number in (loss, learning_rate, grad_norm))
    return hashlib.sha256(f"{chain}:{step} {numbers}".encode()).hexdigest()


@dataclass(frozen=True)
class _HistoryEntry:
    step: NonNegative
    loss: Finite
    lr: Finite = 0.0
    grad_norm: Finite = 0.0


@dataclass(frozen=True)
class _FirstVersion:
    """The fields of version 1 that differ from today's."""

    history: list[_HistoryEntry] = field(default_factory=list)
    samples_seen: NonNegative = 0


def _from_first_version(values: Mapping[str, Any]) -> dict[str, Any]:
    names = ("history", "samples_seen")
    old = TypeAdapter(_FirstVersion).validate_python({name: values[name] for name in names if name in values})
    chain = ""
    for entry in old.history:
        chain = chain_step(chain, entry.step, entry.loss, entry.lr, entry.grad_norm)
    kept = {name: value for name, value in values.items() if name not in names}
    last = old.history[-1].loss if old.history else None
    # Without its size at the time, the metrics file is cut by the steps that its lines name.
    return {"rows_seen": old.samples_seen, "history_digest": chain, "last_loss": last, **kept, "version": STATE_VERSION}
