"""The choice of the checkpoint that a run continues from, and the checks that it may."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from dist_qft.config.schema import RunConfig
from dist_qft.config.section import Section, with_defaults
from dist_qft.errors import CorruptFileError, UserError
from dist_qft.storage.checkpoint import Checkpoint, fault_in, list_checkpoints, newest_valid, read_checkpoint

_FIXED = ("seed", "global_batch_size", "optim")  # train settings without which it is not the same run
_CHANGEABLE = ("train", "task", "checkpoint", "evaluation")
_CHOICES = "continue with --resume auto, or choose another folder"


def resume_after_restart(output_dir: Path, resume: str | None, env: Mapping[str, str]) -> str | None:
    """The meaning of `--resume` in this start: 'auto' where a launcher starts the run again by itself and it has saved.

    So a requeued Slurm job and a group that torchrun restarts (--max-restarts) go on where they were, whatever they
    were first told; before the first checkpoint they begin as they were told to. torchrun does not tell all nodes alike
    which start this is, so with --max-restarts each one counts as a restart.
    """
    again = any(env.get(name, "0") != "0" for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"))
    return "auto" if again and list_checkpoints(output_dir) else resume


def choose_checkpoint(output_dir: Path, resume: str | None) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to continue from (None: start fresh), and lines to tell, such as one that was refused.

    Args:
        resume: None, 'auto' (the newest that verifies, if any), or a checkpoint folder.

    Raises:
        UserError: checkpoints are there that the run would mix with its own, or no such folder.
        CorruptFileError: the named one, or every one, fails verification.
    """
    if resume == "":
        raise UserError("--resume: got '', must be auto or a checkpoint folder")
    existing = list_checkpoints(output_dir)
    if resume is None:
        if existing:
            raise UserError(f"output_dir: '{output_dir}' already holds {existing[-1].name}; {_CHOICES}")
        return None, []
    if resume == "auto":
        path, refused = newest_valid(output_dir)
        if path is None and refused:
            raise CorruptFileError(f"no checkpoint in '{output_dir}' verifies: {refused[0]}")
        if path is None:
            return None, [f"no checkpoint in '{output_dir}' yet: starting from the beginning"]
        return read_checkpoint(path), refused
    checkpoint = read_checkpoint(Path(resume))
    _refuse_mixture(output_dir, existing, checkpoint.path)
    return checkpoint, []


def _refuse_mixture(output_dir: Path, existing: list[Path], chosen: Path) -> None:
    """The run's folder may hold the chosen checkpoint and older ones: the run will write the later ones itself."""
    places = [path.resolve() for path in existing]
    others = existing[places.index(chosen.resolve()) + 1 :] if chosen.resolve() in places else existing
    valid = [path.name for path in others if fault_in(path) is None]
    if valid:
        raise UserError(f"output_dir: '{output_dir}' already holds {valid[-1]}, not only '{chosen}'; {_CHOICES}")


def check_trajectory(checkpoint: Checkpoint, config: RunConfig, data_digest: str, total_steps: int) -> None:
    """Refuse to continue on other data, another seed or another batch, or to an earlier end: not the same run.

    Raises:
        UserError: naming the setting, its value then and now.
    """
    path, state = checkpoint.path, checkpoint.state
    saved = _saved_settings(checkpoint)
    for key in _FIXED:
        now = getattr(config.train, key)
        if saved.get(key) != now:
            raise UserError(f"{path}: train.{key} was {saved.get(key)}, the config says {now}")
    if state.data_digest != data_digest:
        raise UserError(
            f"{path}: trained on data {state.data_digest[:16]}..., data.train is now {data_digest[:16]}... "
            "(another file, tokenizer, template or data setting); a new run with method.init_from trains on from its "
            "values with other data"
        )
    if state.step > total_steps:
        key = "num_train_epochs" if config.train.max_steps is None else "max_steps"
        raise UserError(f"{path}: is at step {state.step}, beyond the {total_steps} steps that train.{key} asks for")
    if state.step < total_steps and state.rows_seen != state.step * config.train.global_batch_size:
        raise UserError(
            f"{path}: ended with an incomplete batch, after {state.rows_seen} rows in {state.step} steps of "
            f"{config.train.global_batch_size}; a longer run would have filled it, so it cannot be continued"
        )


def changed_settings(checkpoint: Checkpoint, config: RunConfig) -> list[str]:
    """One line for each setting of these sections that may change on resume and did."""
    notes = []
    for name in _CHANGEABLE:
        section: Section = getattr(config, name)
        now = section.model_dump(mode="json")  # as checkpoints have it
        notes += [
            f"{name}.{key} was {was} until step {checkpoint.state.step}, it is now {now[key]}"
            for key, was in with_defaults(section, _saved_settings(checkpoint, name)).items()
            if was != now[key]
        ]
    return notes


def _saved_settings(checkpoint: Checkpoint, section: str = "train") -> dict[str, object]:
    settings = checkpoint.state.config.get(section)
    return settings if isinstance(settings, dict) else {}


def chain_rows(chain: str, row_ids: list[int]) -> str:
    """Extend the hash chain over the ids of all rows used so far, in order."""
    text = chain + ":" + ",".join(map(str, row_ids))
    return hashlib.sha256(text.encode()).hexdigest()
