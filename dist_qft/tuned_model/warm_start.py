"""`method.init_from`: trainables that begin with the values of an earlier run or of a PEFT folder.

Values alone are taken: optimizer, data and schedule begin anew. Everything that does not fit is refused before the base
is loaded, but for its fingerprint, which only a loaded base has.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dist_qft.base_model.base_settings import CONFIG, BaseSettings
from dist_qft.config.data_schema import REFERENCE_TASKS, TaskConfig
from dist_qft.errors import CorruptFileError, UserError
from dist_qft.methods.adapters.attach import AdapterSet
from dist_qft.methods.adapters.token_rows import TokenRows
from dist_qft.methods.specs import KINDS
from dist_qft.methods.trainable import TrainableSpec
from dist_qft.ranks.collectives import everywhere
from dist_qft.storage.checkpoint import TRAINER_STATE, list_checkpoints
from dist_qft.storage.manifest import MANIFEST
from dist_qft.storage.reach import require_reachable
from dist_qft.storage.run_folder import read_json_object
from dist_qft.tuned_model.assemble import Assembled
from dist_qft.tuned_model.checkpointed import find_checkpoint, settings_in, task_name
from dist_qft.tuned_model.peft_lora import KEY, PEFT_CONFIG, read_peft_lora
from dist_qft.tuned_model.task import HEAD

PEFT_WEIGHTS = "adapter_model.safetensors"
OUR_KINDS = tuple(kind.spec.peft_type for kind in KINDS.values())


@dataclass(frozen=True)
class StartingValues:
    """Values of all trainables by name.

    Attributes:
        where: the place they come from.
        fingerprint: of the base that they were trained on; None if it is not known.
        settings: of that base, likewise.
        rows: of trained tokens, (n, width) float32 by their table's path: whole rows, not differences from the base's.
        compared: they come from a run that preferred answers to others, compared with the base as such runs are.
    """

    where: str
    tensors: Mapping[str, Tensor]
    fingerprint: str | None = None
    settings: BaseSettings | None = None
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    compared: bool = False


def starting_values(source: str, spec: TrainableSpec[Any], task: TaskConfig) -> StartingValues:
    """The values at `source`: a run (its newest checkpoint), a checkpoint, a PEFT LoRA folder or its Hub id.

    Raises:
        UserError: there is nothing of that kind, or it does not fit the trainables that the config describes, or
            the task's reference.
        CorruptFileError: a file of it is damaged.
        SetupError: it is in a folder that this user may not enter.
    """
    found = _found(source, spec)
    _require_reference(found, task)
    return found


def _found(source: str, spec: TrainableSpec[Any]) -> StartingValues:
    folder = Path(source)
    require_reachable(folder, KEY)
    if not folder.exists():
        folder = _from_hub(source)
    place = _place_of_adapters(folder)
    if place is None:
        raise UserError(f"{KEY}: got '{source}', must be a run, a checkpoint, or a PEFT folder with {PEFT_CONFIG}")
    if _is_ours(place):
        checkpoint = find_checkpoint(folder)
        return _ours(checkpoint.path, checkpoint.adapter_config, checkpoint.trainables, spec)
    config, tensors = _adapter_files(place)
    if config.get("peft_type") in OUR_KINDS:  # `dist-qft push` sends such folders
        return _ours(place, config, tensors, spec)
    pairs, rows = read_peft_lora(place, config, tensors, spec)
    return StartingValues(str(place), pairs, rows=rows)


def _place_of_adapters(folder: Path) -> Path | None:
    """The folder itself if adapters lie in it, else its newest checkpoint, ours or another trainer's; None without.

    Other trainers leave the last adapters in the folder, and checkpoints of the names that ours have below.
    """
    if (folder / PEFT_CONFIG).is_file() or (folder / TRAINER_STATE).is_file():
        return folder
    return next(reversed(list_checkpoints(folder)), None)


def _is_ours(folder: Path) -> bool:
    """True for a checkpoint of this program, whole or not; other trainers write a `trainer_state.json`, too."""
    kind = read_json_object(folder / PEFT_CONFIG).get("peft_type")
    has_state = any((folder / name).is_file() for name in (TRAINER_STATE, MANIFEST))
    return has_state and (kind is None or kind in OUR_KINDS)


def _require_reference(start: StartingValues, task: TaskConfig) -> None:
    """Refuse to compare a model that begins with another one's values with the base, which is not what it begins as.

    Raises:
        UserError: with a remedy. A run that was compared with the base itself may go on so.
    """
    if task.has_reference and not start.compared:
        raise UserError(
            f"{KEY}: got {start.where}, must be empty for task {task.name}: its reference is the base without "
            "adapters, and not what training begins with; merge them (`dist-qft merge`), and make the result model.path"
        )


def require_same_model(start: StartingValues, now: BaseSettings) -> None:
    """Refuse values that were trained on a base with another config.json; another tokenizer is a new run's choice."""
    if start.settings is not None and (found := now.differences(start.settings, (CONFIG,))):
        raise UserError(f"{KEY}: the base's {found[0]} as when {start.where} was trained")


def take_values(parts: Assembled, start: StartingValues) -> None:
    """Put the starting values into the trainables. UserError, alike on all ranks, if they are another base's."""
    fingerprint = parts.base.fingerprint
    if start.fingerprint is not None and start.fingerprint != fingerprint:
        raise everywhere(
            UserError(
                f"{KEY}: {start.where} was trained on base {start.fingerprint[:16]}..., this base is "
                f"{fingerprint[:16]}... (another model or another quantization)"
            )
        )
    parts.load_tensors(_with_own_head(parts, start.tensors))
    if isinstance(parts.trainables, AdapterSet) and parts.trainables.token_rows is not None:
        _take_rows(parts, parts.trainables.token_rows, start.rows)


def _with_own_head(parts: Assembled, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values for the trainables beside the base, and for the task's head if they have one of its shape.

    A head of another task is left out, and one that is not there begins as in a run of its own.
    """
    values = {name: tensor for name, tensor in tensors.items() if name != HEAD}
    for name, begun in parts.task.named_tensors():
        found = tensors.get(name)
        values[name] = found if found is not None and found.shape == begun.shape else begun.detach()
    return values


@torch.no_grad()
def _take_rows(parts: Assembled, token_rows: TokenRows, rows: Mapping[str, Tensor]) -> None:
    """Make the trained tokens' rows equal `rows`, by their table: differences from the base's own. Collective.

    On rank 0 alone, as `start_fresh` does.
    """
    tables, ids = parts.base.tables(), torch.tensor(token_rows.tokens.ids)
    for path, wanted in rows.items():
        table = tables[path]
        gathered = {name: parts.engine.gather(getattr(table, name)) for name in table.packed()}
        packed = {name: tensor.index_select(0, ids) for name, tensor in gathered.items() if tensor is not None}
        del gathered
        if dist.get_rank() == 0:
            own = table.format.dequantize(packed, (len(ids), table.embedding_dim), table.dtype)
            token_rows.deltas[path].copy_(wanted - own.float())


def _from_hub(source: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=[PEFT_CONFIG, PEFT_WEIGHTS]))
    except Exception as error:  # the library raises its own, those of its HTTP client, OSError and ValueError
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{KEY}: '{source}' is not here, and loading it from the Hub failed: {reason}") from error


def _adapter_files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of a folder of adapters."""
    try:
        config = json.loads((folder / PEFT_CONFIG).read_bytes())
        tensors = load_file(folder / PEFT_WEIGHTS)
    except FileNotFoundError as error:
        raise UserError(f"{KEY}: {folder} has no {PEFT_WEIGHTS}") from error
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise CorruptFileError(f"{folder}: not a readable PEFT folder: {error}") from error
    if not isinstance(config, dict):
        raise CorruptFileError(f"{folder / PEFT_CONFIG}: not a PEFT config")
    return config, tensors


def _ours(
    where: Path, config: dict[str, Any], tensors: Mapping[str, Tensor], spec: TrainableSpec[Any]
) -> StartingValues:
    """The values of an adapter that this program has written, if it fits the trainables that the config describes."""
    if config.get("peft_type") != spec.peft_type:
        raise UserError(f"{KEY}: {where} holds {config.get('peft_type')!r}, must be {spec.peft_type!r}")
    values = spec.starting_values(config, tensors, f"{KEY}: {where}")
    fingerprint, settings = str(config.get("base_fingerprint")), settings_in(config, str(where))
    return StartingValues(str(where), values, fingerprint, settings, compared=task_name(config) in REFERENCE_TASKS)
