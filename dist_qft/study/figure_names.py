"""The names of the figures that a run will have: those that may be compared, and by which a search may choose."""

from collections.abc import Sequence
from dataclasses import dataclass

from dist_qft.config.check import TASK_METRICS
from dist_qft.config.schema import RunConfig

TASK = "task/"  # a figure of lm-evaluation-harness: task/<task>/<metric>
MERGED = "merged_"


@dataclass(frozen=True)
class FigureNames:
    """The figures of the runs of one combination of the axes.

    Attributes:
        names: those on held-out data.
        prefixes: of the figures on tasks of lm-evaluation-harness, whose metrics only the harness knows.
    """

    names: tuple[str, ...]
    prefixes: tuple[str, ...]

    @classmethod
    def of(cls, config: RunConfig, tasks: Sequence[str], *, merged: bool) -> "FigureNames":
        """The names for a run's config, the study's tasks, and whether its merged file is measured."""
        held_out = config.data is not None and (config.data.eval is not None or config.data.eval_samples > 0)
        names = ["loss", *TASK_METRICS[config.task.name]] if held_out else []
        names += ["merged_loss"] if merged else []
        prefixes = [TASK, *([MERGED + TASK] if merged else [])] if tasks else []
        return cls(tuple(names), tuple(prefixes))

    def have(self, figure: str) -> bool:
        """True if the runs will have the figure."""
        return figure in self.names or figure.startswith(self.prefixes)

    def refusal(self, figure: str, label: str) -> str:
        """A message on a figure that the runs of `label` will not have."""
        known = [*self.names, *(f"{prefix}<task>/<metric>" for prefix in self.prefixes)]
        return f"got '{figure}', must be a figure of '{label}': {', '.join(known) or 'it has no held-out data'}"
