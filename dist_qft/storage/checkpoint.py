"""Checkpoints: small, whole, verified, never overwritten, and free of pickle.

A checkpoint is a folder `checkpoint-<step>` with

    adapter_config.json        what the trainables are and which base they belong to
    adapter_model.safetensors  the trainables, float32
    optimizer.safetensors      the optimizer's moments
    trainer_state.json         step, rows seen, data digest and chain, resolved config (`trainer_state`)
    manifest.json              size and SHA-256 of every other file

It is published whole (`manifest`), and only then are old ones removed. Reading verifies the manifest first, so a torn
or altered checkpoint is refused with the file's name, and the newest one that verifies is used. Trainables are
replicated: rank 0 writes, any world size and any engine can resume.

Not here: which checkpoint a run continues from and whether it may (`training/resume`).
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dist_qft.errors import CorruptFileError, SetupError, UserError
from dist_qft.storage import manifest
from dist_qft.storage.atomic import (
    nearest_existing,
    remove_folder,
    remove_leftovers,
    remove_unfinished,
    temporary_name,
)
from dist_qft.storage.manifest import publish_folder
from dist_qft.storage.stored_faults import first_fault
from dist_qft.storage.trainer_state import TrainerState

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_MODEL = "adapter_model.safetensors"
OPTIMIZER = "optimizer.safetensors"
TRAINER_STATE = "trainer_state.json"
_FILES = (ADAPTER_CONFIG, ADAPTER_MODEL, OPTIMIZER, TRAINER_STATE)

_NAME = re.compile(r"checkpoint-(0|[1-9]\d{0,17})")

_T = TypeVar("_T")


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a checkpoint holds, and where it lies or is about to be written."""

    path: Path
    adapter_config: dict[str, Any]
    trainables: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: TrainerState

    def copied(self) -> "Checkpoint":
        """The same content on the CPU, in memory that training does not change."""
        return replace(
            self,
            trainables={name: tensor.detach().to("cpu", copy=True) for name, tensor in self.trainables.items()},
            optimizer={name: tensor.detach().to("cpu", copy=True) for name, tensor in self.optimizer.items()},
            state=replace(self.state),
        )

    def drop_tensors(self) -> None:
        """Let go of the values, once they have been taken: every rank has read gigabytes for a large adapter."""
        self.trainables.clear()
        self.optimizer.clear()

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Name and content of each file, one at a time: the moments of a large adapter are gigabytes."""
        yield ADAPTER_CONFIG, (json.dumps(self.adapter_config, indent=1) + "\n").encode()
        yield ADAPTER_MODEL, save(self.trainables)
        yield OPTIMIZER, save(self.optimizer)
        yield TRAINER_STATE, self.state.to_bytes()


def checkpoint_path(output_dir: Path, step: int) -> Path:
    """The folder of the checkpoint of `step`."""
    return output_dir / f"checkpoint-{step}"


def write_checkpoint(checkpoint: Checkpoint) -> None:
    """Publish a checkpoint at its path: complete and verified, or not at all.

    A valid one of the same run and step that is there already is kept, a torn one is replaced.

    Raises:
        UserError: another run's checkpoint is there; it is not touched.
        SetupError: no space or no permission; nothing is left behind.
        CorruptFileError: the files read back differently from the written bytes, or there is nothing to write.
    """
    final = checkpoint.path
    if not checkpoint.trainables or any(tensor.numel() == 0 for tensor in checkpoint.trainables.values()):
        raise CorruptFileError(f"{final}: refusing to write an empty adapter file")
    if final.exists():
        if fault_in(final) is None:
            if _is_of_same_run(final, checkpoint):
                return
            raise UserError(
                f"{final}: it is another run's checkpoint, which is not replaced; choose another output_dir"
            )
        remove_folder(final)
    publish_folder(final, checkpoint.files())


def _is_of_same_run(folder: Path, checkpoint: Checkpoint) -> bool:
    """True if this run wrote the valid checkpoint in `folder`, or would write the same at this step."""
    there = read_checkpoint(folder)
    if there.state.run_id:
        return there.state.run_id == checkpoint.state.run_id
    return there.trainables.keys() == checkpoint.trainables.keys() and all(
        torch.equal(tensor, checkpoint.trainables[name].cpu()) for name, tensor in there.trainables.items()
    )


def fault_in(folder: Path) -> str | None:
    """The reason why this checkpoint cannot be trusted, with the file; None if every file is as the manifest says.

    A folder called `checkpoint-<step>` must also hold the state of that step: its name decides which one is the newest.
    """
    if fault := manifest.fault_in(folder, _FILES):
        return fault
    named = _NAME.fullmatch(folder.name)
    if named is None:
        return None
    try:
        step = _read_state(folder).step
    except CorruptFileError as error:
        return str(error).removeprefix(f"{folder}/")
    return None if step == int(named[1]) else f"{TRAINER_STATE}: is the state of step {step}, not of step {named[1]}"


def read_checkpoint(folder: Path) -> Checkpoint:
    """Verify and read one checkpoint.

    Raises:
        UserError: no such folder.
        CorruptFileError: a file is missing, altered, or not of its format; the file is named.
    """
    if not folder.is_dir():
        raise UserError(f"no checkpoint folder '{folder}'")
    if fault := fault_in(folder):
        raise CorruptFileError(f"{folder}: {fault}")
    checkpoint = Checkpoint(
        path=folder,
        adapter_config=_parsed(folder / ADAPTER_CONFIG, TypeAdapter(dict[str, Any]).validate_json),
        trainables=_parsed(folder / ADAPTER_MODEL, load),
        optimizer=_parsed(folder / OPTIMIZER, load),
        state=_read_state(folder),
    )
    for name, tensor in checkpoint.trainables.items():
        if tensor.dtype != torch.float32:
            raise CorruptFileError(f"{folder / ADAPTER_MODEL}: {name}: got {tensor.dtype}, must be torch.float32")
        if not torch.isfinite(tensor).all():
            raise CorruptFileError(f"{folder / ADAPTER_MODEL}: {name}: holds values that are not finite")
    return checkpoint


def _read_state(folder: Path) -> TrainerState:
    return _parsed(folder / TRAINER_STATE, TrainerState.from_bytes)


def _parsed(path: Path, parse: Callable[[bytes], _T]) -> _T:
    try:
        return parse(path.read_bytes())
    except ValidationError as error:
        reason = first_fault(error)
    except (SafetensorError, OSError) as error:
        reason = str(error)
    raise CorruptFileError(f"{path}: {reason}")


def is_checkpoint_name(name: str) -> bool:
    """True for the name of a checkpoint's folder in a run."""
    return _NAME.fullmatch(name) is not None


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Published checkpoints, oldest first; temporary folders are not among them."""
    found = [(int(m[1]), path) for path in output_dir.glob("*") if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def newest_valid(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and one line for each newer one that does not."""
    refused: list[str] = []
    for path in reversed(list_checkpoints(output_dir)):
        fault = fault_in(path)
        if fault is None:
            return path, refused
        refused.append(f"{path}: refused: {fault}")
    return None, refused


def prune(output_dir: Path, keep: int, best_step: int = 0) -> None:
    """Remove all checkpoints older than the newest `keep` valid ones, except that of `best_step`.

    Torn ones do not count as valid.
    """
    valid = 0
    for path in reversed(list_checkpoints(output_dir)):
        if valid == keep:
            if path != checkpoint_path(output_dir, best_step):
                remove_folder(path)
        elif fault_in(path) is None:
            valid += 1


def clean_up(output_dir: Path) -> None:
    """Remove leftovers of dead processes in a run's folder; only for the process that holds the run's lock."""
    # The lock's holder alone writes checkpoints here, so an unfinished one is left over whoever wrote it.
    remove_unfinished(output_dir, _NAME)
    remove_leftovers(output_dir)


def require_writable(folder: Path, key: str = "output_dir") -> None:
    """Prove, before anything heavy is done, that files can be created in the folder.

    A folder that is not there yet is not made, since the run may still be refused; the nearest folder above counts.

    Args:
        key: the setting that names it, for the message.

    Raises:
        SetupError: the system refuses that.
        UserError: no file system allows such a name.
    """
    if "\0" in str(folder):
        raise UserError(f"{key}: got {str(folder)!r}, must be a path without NUL characters")
    try:
        probe = temporary_name(nearest_existing(folder) / "probe")
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise SetupError(f"{key}: cannot write to '{folder}': {error.strerror}") from error


def require_checkpoint_space(output_dir: Path, needed: int) -> None:
    """Refuse to start a run whose first checkpoint, of at least `needed` bytes, would not fit.

    Raises:
        SetupError: with both numbers.
    """
    require_space(output_dir, needed, "output_dir", "a checkpoint")


def require_space(folder: Path, needed: int, key: str, what: str) -> None:
    """Refuse to begin what would end on a full disk.

    Args:
        folder: need not be there yet.
        needed: bytes that will be written at least.
        key: the setting that names the folder, and `what` will be written there, for the message.

    Raises:
        SetupError: with both numbers.
    """
    free = shutil.disk_usage(nearest_existing(folder)).free
    if free < needed:
        raise SetupError(f"{key}: '{folder}' has {free} bytes free, {what} needs {needed}")
