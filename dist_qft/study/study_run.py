"""One run of a study: its settings, the variants that it stands for, and its measurements."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dist_qft.config.schema import RunConfig
from dist_qft.harness.tasks import TaskRequest
from dist_qft.study.presets import Variant
from dist_qft.study.stages import MergeStage


def label_of(subject: Mapping[str, str], config: RunConfig) -> str:
    """The name of a combination of the axes: its labels, or the method where there is one combination only."""
    return ", ".join(subject.values()) or config.method.name


@dataclass(frozen=True)
class StudyRun:
    """One run of a study.

    Attributes:
        subject: axis -> label.
        variants: those that the run stands for; several if presets meet in it.
        trainables: number of trainable values, by the method's formula.
        kept: group -> parameters after / parameters of the reference; empty where the method has no adapters.
        base_key: equal for runs that may use one loaded base.
        merge: the merge whose result is measured, if there is one.
        tries: the value that this run of a search tries; None for a run that is compared.
        further: the value lies beyond the first ones of its search.
        tasks: of lm-evaluation-harness, on which the run's model and its merged file are measured.
        keep: what stays of the run beside its figures.
    """

    name: str
    config: RunConfig
    subject: dict[str, str]
    variants: tuple[Variant, ...]
    trainables: int
    kept: dict[str, float] = field(hash=False)
    base_key: str = ""
    merge: MergeStage | None = None
    tries: float | None = None
    further: bool = False
    tasks: TaskRequest | None = None
    keep: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """The folder in which the run keeps its files."""
        return Path(self.config.output_dir)

    @property
    def label(self) -> str:
        """The name of the combination of the axes."""
        return label_of(self.subject, self.config)

    def __str__(self) -> str:
        subject = [f"{axis} {label}" for axis, label in self.subject.items()]
        tried = [] if self.tries is None else [f"tries {self.tries:g}"]
        return ", ".join([*subject, " = ".join(map(str, self.variants)), *tried, f"seed {self.config.train.seed}"])
