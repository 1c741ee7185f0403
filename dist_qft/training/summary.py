"""`summary.json`: the run in figures, written when it has come to its end."""

import json
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

from dist_qft.storage.atomic import write_json
from dist_qft.storage.run_folder import SUMMARY_FILE

_PACKAGES = ("dist-qft", "torch", "transformers", "bitsandbytes")


@dataclass(frozen=True)
class SummaryFigures:
    """The content of `summary.json`.

    Attributes:
        base_eval_loss, tuned_eval_loss: mean held-out loss in nats per target; None without held-out data.
        gather_bytes_per_step, reduce_bytes_per_step, tokens_per_second: of this process's own steps on this rank;
            None if it ran none.
        base_bytes_per_rank, peak_rss_bytes, peak_device_bytes: of the rank with the most; the last is None on CPUs.
        load_peak_rss_bytes: the largest resident size until the base was loaded, of the rank with the most.
        seconds: of this process, start-up excluded.
    """

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


def summarized_steps(output_dir: Path) -> int | None:
    """Number of steps in the folder's summary; None if there is no summary."""
    try:
        return json.loads((output_dir / SUMMARY_FILE).read_bytes())["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
