"""Which checkpoint a run continues from, and whether it may."""

import hashlib
from pathlib import Path

from dist_qft.checkpoint import Checkpoint, list_checkpoints, newest_valid, read_checkpoint
from dist_qft.config.schema import RunConfig
from dist_qft.errors import CorruptFileError, UserError


def choose_checkpoint(output_dir: Path, resume: str | None) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to continue from (None: start fresh), and a line for each one that was refused.

    Args:
        resume: None, 'auto' (the newest that verifies, if any), or a checkpoint folder.

    Raises:
        UserError: checkpoints are there but nobody said what to do with them, or no such folder.
        CorruptFileError: the named one, or every one, fails verification.
    """
    if resume is None:
        existing = list_checkpoints(output_dir)
        if existing:
            raise UserError(
                f"output_dir: '{output_dir}' already holds {existing[-1].name}; "
                "continue with --resume auto, or choose another folder"
            )
        return None, []
    if resume != "auto":
        return read_checkpoint(Path(resume)), []
    path, refused = newest_valid(output_dir)
    if path is None and refused:
        raise CorruptFileError(f"no checkpoint in '{output_dir}' verifies: {refused[0]}")
    return (None if path is None else read_checkpoint(path)), refused


def check_trajectory(checkpoint: Checkpoint, config: RunConfig, data_digest: str) -> None:
    """Refuse to continue on other data, another seed or another batch: it would not be the same run.

    Raises:
        UserError: naming the setting, its value then and now.
    """
    saved = checkpoint.state.config["train"]
    for key in ("seed", "global_batch_size"):
        now = getattr(config.train, key)
        if saved[key] != now:
            raise UserError(f"{checkpoint.path}: train.{key} was {saved[key]}, the config says {now}")
    then = checkpoint.state.data_digest
    if then != data_digest:
        raise UserError(
            f"{checkpoint.path}: trained on data {then[:16]}..., data.train is now {data_digest[:16]}... "
            "(another file, tokenizer, template or data setting)"
        )


def chain_samples(chain: str, sample_ids: list[int]) -> str:
    """Extend the hash chain over the ids of all samples used so far, in order."""
    text = chain + ":" + ",".join(map(str, sample_ids))
    return hashlib.sha256(text.encode()).hexdigest()
