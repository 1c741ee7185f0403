"""A run's checkpoints: finding one, its config, and its base with the trainables on it."""

import datetime
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from dist_qft.base_model.base_settings import TOKENIZER, BaseSettings, base_settings
from dist_qft.base_model.skeleton import BaseModel, build_skeleton
from dist_qft.base_model.tokenizer import run_tokenizer
from dist_qft.config.schema import RunConfig
from dist_qft.data.chat_template import has_clock
from dist_qft.errors import CorruptFileError, DistQFTError, NumericError, UserError
from dist_qft.methods.specs import stored_spec
from dist_qft.methods.trainable import TrainableSpec, section
from dist_qft.ranks.collectives import everywhere
from dist_qft.ranks.device import compute_dtype
from dist_qft.ranks.world import World
from dist_qft.storage.checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_MODEL,
    TRAINER_STATE,
    Checkpoint,
    checkpoint_path,
    newest_valid,
    read_checkpoint,
)
from dist_qft.storage.run_folder import result_step
from dist_qft.storage.stored_faults import first_fault
from dist_qft.tuned_model.assemble import Assembled, assemble

Requirement = Callable[[BaseModel, PreTrainedTokenizerBase], None]

_SETTINGS = "base_settings"  # in adapter_config.json
TASK = "task"  # in one that was pushed


def find_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at `path`; of a run's folder the newest one, or the best if the run has taken that for its result.

    Raises:
        UserError: there is none.
        CorruptFileError: it fails verification. An older one is taken only by its own name, lest it be mistaken for the
            run's last.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"no run or checkpoint folder '{folder}'")
    if (folder / TRAINER_STATE).is_file():
        return read_checkpoint(folder)
    newest, refused = newest_valid(folder)
    if refused:
        remedy = f"; the newest that verifies is {newest}" if newest else ""
        raise CorruptFileError(f"{refused[0]}{remedy}")
    if newest is None:
        raise UserError(f"'{folder}' holds no checkpoint")
    checkpoint = read_checkpoint(newest)
    path = checkpoint_path(folder, result_step(folder, checkpoint.state.step))
    if path == newest:
        return checkpoint
    if not path.is_dir():
        raise UserError(f"'{folder}': {path.name}, the run's result, is gone; the newest checkpoint is {newest}")
    return read_checkpoint(path)


def run_folder(path: str | Path) -> Path:
    """The run's folder, given that folder or one of its checkpoints; where its results and caches go."""
    folder = Path(path)
    if not (folder / TRAINER_STATE).is_file():
        return folder
    return folder.parent if folder.name not in ("", "..") else folder.resolve().parent


def config_of(checkpoint: Checkpoint) -> RunConfig:
    """The config the checkpoint was trained with."""
    try:
        return RunConfig.model_validate(checkpoint.state.config)
    except ValidationError as error:
        where = f"{checkpoint.path / TRAINER_STATE}: not a config of this version"
        raise CorruptFileError(f"{where}: {first_fault(error)}") from error


def config_here(checkpoint: Checkpoint, world: World) -> RunConfig:
    """The config the checkpoint was trained with, for ranks that may be fewer or more than those that trained it.

    A number of ranks in `sharding.group` was chosen for those; where it does not divide these, they share one base.
    """
    config = config_of(checkpoint)
    group = config.sharding.group
    if isinstance(group, str) or world.world_size % group == 0:
        return config
    return config.model_copy(update={"sharding": config.sharding.model_copy(update={"group": "world"})})


def with_date(config: RunConfig, tokenizer: PreTrainedTokenizerBase, checkpoint: Checkpoint | None) -> RunConfig:
    """The config with `data.date`, if it has none and the chat template prints the date.

    That of the checkpoint, so that a run meets the same tokens on another day, or for a new run this day's.
    """
    if config.data is None or config.data.date is not None or not has_clock(tokenizer):
        return config
    stored = (checkpoint.state.config.get("data") or {}).get("date") if checkpoint else None
    day = stored if isinstance(stored, str) else datetime.date.today().isoformat()
    return config.model_copy(update={"data": config.data.model_copy(update={"date": day})})


def open_checkpointed(
    checkpoint: Checkpoint, config: RunConfig, device: torch.device, require: Requirement | None = None
) -> tuple[Assembled, PreTrainedTokenizerBase]:
    """Load the base and put the checkpoint's trainables on it, ready for use. Collective.

    Args:
        require: called before a weight is loaded, on every rank; may raise a DistQFTError, alike on all.

    Raises:
        UserError: the checkpoint belongs to another base, or the base's settings have changed since.
        NumericError: its trainables are not finite.
    """
    require_finite_trainables(checkpoint)
    tokenizer = run_tokenizer(config)
    skeleton = build_skeleton(config.model, config.quantization, compute_dtype(config.train.precision, device))
    try:
        notes = check_settings(checkpoint, config, settings_of(config, skeleton, tokenizer))
        if require is not None:
            require(skeleton, tokenizer)
    except DistQFTError as error:
        raise everywhere(error) from error
    if dist.get_rank() == 0:
        print(*notes, sep="\n", end="\n" * bool(notes), file=sys.stderr)
    parts = assemble(config, skeleton, stored_spec(checkpoint, skeleton), device)
    check_fingerprint(checkpoint, parts.base)
    parts.load_tensors(checkpoint.trainables)
    parts.trainables.eval()
    return parts, tokenizer


def require_finite_trainables(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that holds NaN or infinite values, naming the tensor. NumericError, alike on all ranks."""
    for name, tensor in checkpoint.trainables.items():
        if not torch.isfinite(tensor).all():
            raise NumericError(
                f"{checkpoint.path / ADAPTER_MODEL}: '{name}' holds values that are not finite; the run has diverged"
            )


def adapter_config(
    config: RunConfig, base: BaseModel, spec: TrainableSpec[Any], settings: BaseSettings
) -> dict[str, Any]:
    """The description in an adapter's folder, from which it is loaded, checked and merged later."""
    return {
        "peft_type": spec.peft_type,
        "format_version": 1,
        "method": config.method.name,
        "base_model_name_or_path": config.model.path,
        "base_fingerprint": base.fingerprint,
        _SETTINGS: settings.described(),
        **spec.describe(),
        "run_config": config.model_dump(),
    }


def task_name(adapter_config: Mapping[str, Any]) -> str | None:
    """The task of the run that an adapter's description is of; None if it does not say. Pushed ones say no more."""
    found = adapter_config.get(TASK, section(section(adapter_config, "run_config"), "task").get("name"))
    return found if isinstance(found, str) else None


def settings_of(config: RunConfig, base: BaseModel, tokenizer: PreTrainedTokenizerBase) -> BaseSettings:
    """The settings of a run's base as they are now; `tokenizer` is the run's (`run_tokenizer`)."""
    own_template = config.data is None or config.data.template == "chat"
    return base_settings(config.model, base.config, tokenizer, own_template=own_template)


def stored_settings(checkpoint: Checkpoint) -> BaseSettings | None:
    """The settings that the base had when the checkpoint was trained; None if it is too old to say."""
    return settings_in(checkpoint.adapter_config, str(checkpoint.path))


def settings_in(adapter_config: Mapping[str, Any], where: str) -> BaseSettings | None:
    """The settings of the base in an adapter's description in the folder `where`; None if it is too old to say."""
    stored = adapter_config.get(_SETTINGS)
    return None if stored is None else BaseSettings.read(stored, f"{where}/{ADAPTER_CONFIG}: {_SETTINGS}")


def check_settings(checkpoint: Checkpoint, config: RunConfig, now: BaseSettings) -> list[str]:
    """Refuse a checkpoint whose base has other settings than when it was trained; before the base is loaded.

    Returns:
        Lines for the user: what cannot be told.

    Raises:
        UserError: naming file and key of the first difference.
        CorruptFileError: the checkpoint's record of them cannot be read.
    """
    before = stored_settings(checkpoint)
    if before is None:
        return [
            f"{checkpoint.path}: it is older than the record of its base's config.json, generation_config.json and "
            "tokenizer; that they are unchanged is not checked"
        ]
    differences = now.differences(before)
    # Another release may write down the same tokenizer differently.
    doubtful = [line for line in differences if line.startswith(TOKENIZER) and before.versions != now.versions]
    certain = [line for line in differences if line not in doubtful]
    if certain:
        more = f" ({len(certain) - 1} more settings differ)" if certain[1:] else ""
        raise UserError(f"model.path: '{config.model.path}': {certain[0]} as when {checkpoint.path} was trained{more}")
    then = ", ".join(f"{name} {version}" for name, version in before.versions.items())
    return [f"warning: model.path: '{config.model.path}': {line}, as read by {then}" for line in doubtful]


def check_adapter(checkpoint: Checkpoint, spec: TrainableSpec[Any]) -> None:
    """Refuse a checkpoint whose trainables are not those of the config; before the base is loaded."""
    found = checkpoint.adapter_config
    if found.get("peft_type") != spec.peft_type:
        raise UserError(f"{checkpoint.path}: peft_type: got {found.get('peft_type')!r}, must be {spec.peft_type!r}")
    if difference := spec.difference(found):
        raise UserError(f"{checkpoint.path}: {difference}")


def check_fingerprint(checkpoint: Checkpoint, base: BaseModel) -> None:
    """Refuse an adapter that was trained on another base, or on another quantization of it. Alike on all ranks."""
    expected = str(checkpoint.adapter_config.get("base_fingerprint"))
    if expected != base.fingerprint:
        raise everywhere(
            UserError(
                f"{checkpoint.path}: trained on base {expected[:16]}..., "
                f"this base is {base.fingerprint[:16]}... (another model or another quantization)"
            )
        )
