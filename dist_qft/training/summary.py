"""`summary.json`: the run in figures, written when it has come to its end."""

from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

from dist_qft.storage.atomic import refused_write, write_json
from dist_qft.storage.run_folder import SUMMARY_FILE, read_json_object

_PACKAGES = ("dist-qft", "torch", "transformers", "bitsandbytes")


@dataclass(frozen=True)
class SummaryFigures:
    """The content of `summary.json`.

    Attributes:
        run_id: names the run through all its starts, as its checkpoints have it.
        result_step: the step whose trainables the tuned figures are of, and a merge at the end; not the last one if
            `checkpoint.load_best_at_end` took an earlier one back.
        base_eval_loss, tuned_eval_loss: mean held-out loss in the task's unit; None without held-out data.
        gather_bytes_per_step, reduce_bytes_per_step, tokens_per_second: of this process's own steps on this rank;
            None if it ran none.
        base_bytes_per_rank, peak_rss_bytes, peak_device_bytes: of the rank with the most; the last is None on CPUs.
        load_peak_rss_bytes: the largest resident size until the base was loaded, of the rank with the most.
        seconds: of this process, start-up excluded.
    """

    run_id: str
    method: str
    engine: str
    world_size: int
    steps: int
    base_eval_loss: float | None
    tuned_eval_loss: float | None
    base_eval_metrics: dict[str, float]
    tuned_eval_metrics: dict[str, float]
    eval_tokens: int
    final_train_loss: float | None
    trainable_parameters: int
    base_bytes_per_rank: int
    gather_bytes_per_step: int | None
    reduce_bytes_per_step: int | None
    tokens_per_second: float | None
    load_peak_rss_bytes: int
    peak_rss_bytes: int
    peak_device_bytes: int | None
    seconds: float
    base_fingerprint: str
    result_step: int | None = None
    versions: dict[str, str] = field(default_factory=lambda: {name: version(name) for name in _PACKAGES})

    def results(self) -> dict[str, float | None]:
        """The losses that tell how good the run was."""
        return {
            "base_eval_loss": self.base_eval_loss,
            "tuned_eval_loss": self.tuned_eval_loss,
            "final_train_loss": self.final_train_loss,
        }

    def write(self, output_dir: Path) -> Path:
        """Write the file and return its path; SetupError if the system refuses."""
        path = output_dir / SUMMARY_FILE
        write_json(path, asdict(self))
        return path


def summarized_steps(output_dir: Path, run_id: str) -> int | None:
    """Number of steps in the folder's summary; None if there is none of this run.

    Summaries and checkpoints of earlier versions have no `run_id` and fit any.
    """
    said = read_json_object(output_dir / SUMMARY_FILE)
    steps, of_run = said.get("steps"), said.get("run_id", run_id)
    return steps if isinstance(steps, int) and (of_run == run_id or not run_id) else None


def remove_other_summary(output_dir: Path, run_id: str | None, step: int) -> None:
    """Remove the folder's summary unless it can be one of this run's first `step` steps; None: a run that is new.

    It would pass for that of the run that is about to begin. Raises SetupError if the system refuses.
    """
    path = output_dir / SUMMARY_FILE
    steps = None if run_id is None else summarized_steps(output_dir, run_id)
    if steps is None or steps > step:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise refused_write(path, error) from error
