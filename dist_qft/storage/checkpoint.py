"""Checkpoints: small, whole, verified, never overwritten, and free of pickle.

A checkpoint is a folder `checkpoint-<step>` with

    adapter_config.json        what the trainables are and which base they belong to
    adapter_model.safetensors  the trainables
    optimizer.safetensors      the optimizer's moments
    trainer_state.json         step, rows seen, data digest and chain, loss history, resolved config
    manifest.json              size and SHA-256 of every other file

It is published whole (manifest.py), and only then are old ones removed. Reading verifies the manifest first, so a
torn or altered checkpoint is refused with the file's name, and the newest one that verifies is used. Trainables are
replicated: rank 0 writes, any world size and any engine can resume.

Not here: which checkpoint a run continues from and whether it may (resume.py).
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AliasChoices, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dist_qft.errors import CorruptFileError, SetupError, UserError
from dist_qft.storage import manifest
from dist_qft.storage.atomic import remove_folder, temporary_name
from dist_qft.storage.manifest import publish_folder

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_MODEL = "adapter_model.safetensors"
OPTIMIZER = "optimizer.safetensors"
TRAINER_STATE = "trainer_state.json"
_FILES = (ADAPTER_CONFIG, ADAPTER_MODEL, OPTIMIZER, TRAINER_STATE)

_NAME = re.compile(r"checkpoint-(\d+)")

_T = TypeVar("_T")
NonNegative = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class BaseEvaluation:
    """Held-out loss of the bare base, which a resumed run need not measure again on the same data."""

    data_digest: str
    loss: float
    tokens: int
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class TrainerState:
    """Where a run stands. No RNG state: every random draw is a function of (seed, step, position).

    Attributes:
        rows_seen: rows of the data used so far, over all ranks. A row is a sample, or with packing several samples.
            Checkpoints before format 2 call it `samples_seen`.
        data_chain: hash chain over the ids of all rows used so far, in order.
        world_size: of the run that wrote it, for the record; any other may resume.
        history: step (1-based), loss, lr and grad_norm of every step so far.
        base_eval: None if there is no held-out data.
        evaluated_step: the last step after which held-out loss was measured; a signal may have cut one short.
        best_step, best_loss: with `checkpoint.keep_best`, where held-out loss was lowest so far; else 0 and None.
    """

    step: NonNegative = 0
    rows_seen: Annotated[NonNegative, Field(validation_alias=AliasChoices("rows_seen", "samples_seen"))] = 0
    data_digest: str = ""
    data_chain: str = ""
    world_size: int = 1
    history: list[dict[str, int | float]] = field(default_factory=list)
    base_eval: BaseEvaluation | None = None
    evaluated_step: NonNegative = 0
    best_step: NonNegative = 0
    best_loss: float | None = None
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory."""

    path: Path
    adapter_config: dict[str, Any]
    trainables: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: TrainerState


def write_checkpoint(
    output_dir: Path,
    *,
    adapter_config: dict[str, Any],
    trainables: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    state: TrainerState,
) -> Path:
    """Publish `checkpoint-<step>` under `output_dir`: complete and verified, or not at all.

    A valid one of that step is kept as it is, a torn one is replaced.

    Raises:
        SetupError: no space or no permission; nothing is left behind.
        CorruptFileError: what was read back is not what was written.
    """
    if not trainables or any(tensor.numel() == 0 for tensor in trainables.values()):
        raise CorruptFileError(f"{output_dir}: refusing to write an empty adapter file")
    final = output_dir / f"checkpoint-{state.step}"
    if final.exists():
        if fault_in(final) is None:
            return final
        remove_folder(final)

    def files() -> Iterator[tuple[str, bytes]]:
        # One at a time: the moments of a large adapter are gigabytes.
        yield ADAPTER_CONFIG, _json_bytes(adapter_config)
        yield ADAPTER_MODEL, save(trainables)
        yield OPTIMIZER, save(optimizer)
        yield TRAINER_STATE, _json_bytes(asdict(state))

    publish_folder(final, files())
    return final


def fault_in(folder: Path) -> str | None:
    """Why this checkpoint cannot be trusted, naming the file; None if every file is as the manifest says."""
    return manifest.fault_in(folder, _FILES)


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
    return Checkpoint(
        path=folder,
        adapter_config=_parsed(folder / ADAPTER_CONFIG, TypeAdapter(dict[str, Any]).validate_json),
        trainables=_parsed(folder / ADAPTER_MODEL, load),
        optimizer=_parsed(folder / OPTIMIZER, load),
        state=_parsed(folder / TRAINER_STATE, TypeAdapter(TrainerState).validate_json),
    )


def _parsed(path: Path, parse: Callable[[bytes], _T]) -> _T:
    try:
        return parse(path.read_bytes())
    except ValidationError as error:
        fault = error.errors()[0]
        reason = f"{'.'.join(map(str, fault['loc'])) or 'content'}: {fault['msg']}"
    except (SafetensorError, OSError) as error:
        reason = str(error)
    raise CorruptFileError(f"{path}: {reason}")


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Published checkpoints, oldest first; temporary folders are not among them."""
    found = [(int(m[1]), path) for path in output_dir.glob("*") if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def newest_valid(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and one line for each newer one that does not."""
    refused = []
    for path in reversed(list_checkpoints(output_dir)):
        fault = fault_in(path)
        if fault is None:
            return path, refused
        refused.append(f"{path}: refused: {fault}")
    return None, refused


def prune(output_dir: Path, keep: int, best_step: int = 0) -> None:
    """Remove all that is older than the newest `keep` valid checkpoints, but for that of `best_step`.

    Torn ones do not count as valid.
    """
    valid = 0
    for path in reversed(list_checkpoints(output_dir)):
        if valid == keep:
            if path.name != f"checkpoint-{best_step}":
                remove_folder(path)
        elif fault_in(path) is None:
            valid += 1


def require_writable(output_dir: Path) -> None:
    """Make the folder and prove that files can be created in it; before anything heavy is done."""
    probe = temporary_name(output_dir / "probe")
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise UserError(f"output_dir: cannot write to '{output_dir}': {error.strerror}") from error


def require_space(output_dir: Path, needed: int) -> None:
    """Refuse to start a run whose first checkpoint, of at least `needed` bytes, would not fit."""
    free = shutil.disk_usage(output_dir).free
    if free < needed:
        raise SetupError(f"output_dir: '{output_dir}' has {free} bytes free, a checkpoint needs {needed}")


def _json_bytes(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
