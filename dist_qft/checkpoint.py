"""Checkpoints: small, whole, verified, never overwritten, and free of pickle.

A checkpoint is a folder `checkpoint-<step>` with

    adapter_config.json        what the trainables are and which base they belong to
    adapter_model.safetensors  the trainables
    optimizer.safetensors      the optimizer's moments
    trainer_state.json         step, samples seen, data digest and chain, loss history, resolved config
    manifest.json              size and SHA-256 of every other file

It is written under a temporary name, fsynced, renamed, and only then are old ones removed. Reading verifies
the manifest first, so a torn or altered checkpoint is refused with the file's name, and the newest one that
verifies is used. Trainables are replicated: rank 0 writes, any world size and any engine can resume.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dist_qft.errors import CorruptFileError, SetupError, UserError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_MODEL = "adapter_model.safetensors"
OPTIMIZER = "optimizer.safetensors"
TRAINER_STATE = "trainer_state.json"
MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)$")


@dataclass
class TrainerState:
    """Where a run stands. No RNG state: every random draw is a function of (seed, step, position)."""

    step: int = 0
    samples_seen: int = 0
    data_digest: str = ""
    data_chain: str = ""
    world_size: int = 1
    history: list[dict] = field(default_factory=list)
    config: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory."""

    path: Path
    adapter_config: dict
    trainables: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: TrainerState


def write_checkpoint(
    output_dir: Path,
    *,
    adapter_config: dict,
    trainables: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    state: TrainerState,
) -> Path:
    """Publish `checkpoint-<step>` under `output_dir`; an existing valid one of that step is kept as it is.

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
        shutil.rmtree(final)
    files = {
        ADAPTER_CONFIG: _json_bytes(adapter_config),
        ADAPTER_MODEL: save(_on_cpu(trainables)),
        OPTIMIZER: save(_on_cpu(optimizer)),
        TRAINER_STATE: _json_bytes(asdict(state)),
    }
    return publish_folder(final, files)


def publish_folder(final: Path, files: dict[str, bytes]) -> Path:
    """Write `files` and their manifest as the folder `final`: complete and verified, or not at all."""
    temporary = final.parent / f".tmp-{final.name}-{uuid.uuid4().hex[:8]}"
    manifest = {name: {"size": len(data), "sha256": _sha256(data)} for name, data in files.items()}
    try:
        temporary.mkdir(parents=True)
        for name, data in {**files, MANIFEST: _json_bytes({"version": 1, "files": manifest})}.items():
            _write_synced(temporary / name, data)
        fault = fault_in(temporary)
        if fault:
            raise CorruptFileError(f"{temporary}: read back differently from what was written: {fault}")
        _sync_folder(temporary)
        os.rename(temporary, final)
        _sync_folder(final.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        needed = sum(len(data) for data in files.values())
        raise SetupError(f"{final}: cannot write {needed} bytes: {error.strerror or error}") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def fault_in(folder: Path) -> str | None:
    """Why this checkpoint cannot be trusted, naming the file; None if every file matches the manifest."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())["files"]
        expected = {str(name): (int(e["size"]), str(e["sha256"])) for name, e in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST}: {error}"
    for name, (size, digest) in expected.items():
        if Path(name).name != name:
            return f"{MANIFEST}: file name '{name}' leaves the folder"
        try:
            data = (folder / name).read_bytes()
        except OSError as error:
            return f"{name}: {error.strerror}"
        if len(data) != size:
            return f"{name}: {len(data)} bytes, manifest says {size}"
        if _sha256(data) != digest:
            return f"{name}: SHA-256 {_sha256(data)[:12]}..., manifest says {digest[:12]}..."
    missing = {ADAPTER_CONFIG, ADAPTER_MODEL, TRAINER_STATE} - set(expected)
    return f"{MANIFEST}: does not list {sorted(missing)[0]}" if missing else None


def read_checkpoint(folder: Path) -> Checkpoint:
    """Verify and read one checkpoint.

    Raises:
        UserError: no such folder.
        CorruptFileError: a file is missing, altered, or not of its format; the file is named.
    """
    if not folder.is_dir():
        raise UserError(f"no checkpoint folder '{folder}'")
    fault = fault_in(folder)
    if fault:
        raise CorruptFileError(f"{folder}: {fault}")
    try:
        optimizer = folder / OPTIMIZER
        return Checkpoint(
            folder,
            json.loads((folder / ADAPTER_CONFIG).read_bytes()),
            load((folder / ADAPTER_MODEL).read_bytes()),
            load(optimizer.read_bytes()) if optimizer.exists() else {},
            TrainerState(**json.loads((folder / TRAINER_STATE).read_bytes())),
        )
    except (SafetensorError, ValueError, TypeError) as error:
        raise CorruptFileError(f"{folder}: {error}") from error


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Published checkpoints, oldest first; temporary folders are not among them."""
    found = [(int(m[1]), path) for path in output_dir.glob("checkpoint-*") if (m := _NAME.match(path.name))]
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


def prune(output_dir: Path, keep: int) -> None:
    """Remove the oldest checkpoints beyond `keep` valid ones, and leftovers of interrupted writes."""
    for leftover in output_dir.glob(".tmp-checkpoint-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    valid = [path for path in list_checkpoints(output_dir) if fault_in(path) is None]
    for path in valid[: max(0, len(valid) - keep)]:
        # Renamed first: a half-removed checkpoint must not look like a torn one.
        doomed = path.parent / f".tmp-{path.name}-removed"
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def require_writable(output_dir: Path) -> None:
    """Make the folder and prove that files can be created in it; before anything heavy is done."""
    probe = output_dir / f".probe-{uuid.uuid4().hex[:8]}"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise UserError(f"output_dir: cannot write to '{output_dir}': {error.strerror}") from error


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}


def _json_bytes(value: dict) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
