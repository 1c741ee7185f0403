"""`method.init_from`: trainables that begin with the values of an earlier run or of a PEFT folder.

Values alone are taken: optimizer, data and schedule begin anew. Everything that does not fit is refused before the base
is loaded, but for its fingerprint, which only a loaded base has.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dist_qft.base_model.base_settings import CONFIG, BaseSettings
from dist_qft.errors import CorruptFileError, UserError
from dist_qft.methods.adapters.adapter_spec import AdapterSpec
from dist_qft.methods.adapters.schedule import TileSettings
from dist_qft.methods.specs import KINDS
from dist_qft.methods.trainable import TrainableSpec
from dist_qft.ranks.collectives import everywhere
from dist_qft.storage.checkpoint import TRAINER_STATE, list_checkpoints
from dist_qft.tuned_model.assemble import Assembled
from dist_qft.tuned_model.checkpointed import find_checkpoint, settings_in

KEY = "method.init_from"
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OUR_KINDS = tuple(kind.spec.peft_type for kind in KINDS.values())
# Features that our LoRA lacks: a folder that uses one would lose something of it.
_UNKNOWN_TO_US = ("use_dora", "modules_to_save", "trainable_token_indices", "fan_in_fan_out", "layer_replication")


@dataclass(frozen=True)
class StartingValues:
    """Values of all trainables by name.

    Attributes:
        where: the place they come from.
        fingerprint: of the base that they were trained on; None if it is not known.
        settings: of that base, likewise.
    """

    where: str
    tensors: Mapping[str, Tensor]
    fingerprint: str | None = None
    settings: BaseSettings | None = None


def starting_values(source: str, spec: TrainableSpec[Any]) -> StartingValues:
    """The values at `source`: a run (its newest checkpoint), a checkpoint, a PEFT LoRA folder or its Hub id.

    Raises:
        UserError: there is nothing of that kind, or it does not fit the trainables that the config describes.
        CorruptFileError: a file of it is damaged.
    """
    folder = Path(source)
    if not folder.exists():
        folder = _from_hub(source)
    if (folder / TRAINER_STATE).is_file() or list_checkpoints(folder):
        checkpoint = find_checkpoint(folder)
        return _ours(checkpoint.path, checkpoint.adapter_config, checkpoint.trainables, spec)
    if (folder / PEFT_CONFIG).is_file():
        config, tensors = _adapter_files(folder)
        if config.get("peft_type") in OUR_KINDS:  # `dist-qft push` sends such folders
            return _ours(folder, config, tensors, spec)
        return StartingValues(str(folder), _from_peft(folder, config, tensors, spec))
    raise UserError(f"{KEY}: got '{source}', must be a run, a checkpoint, or a PEFT folder with {PEFT_CONFIG}")


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
    parts.load_tensors(start.tensors)


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
    if difference := spec.difference(config):
        raise UserError(f"{KEY}: {where}: {difference}")
    return StartingValues(str(where), tensors, str(config.get("base_fingerprint")), settings_in(config, str(where)))


def _from_peft(
    folder: Path, config: dict[str, Any], tensors: Mapping[str, Tensor], spec: TrainableSpec[Any]
) -> dict[str, Tensor]:
    """A PEFT LoRA's pairs under our names, B rescaled from its alpha / r to ours."""
    tiles = spec.tiles if isinstance(spec, AdapterSpec) else {}
    if not tiles or any(settings.pool > 1 or settings.repeat > 1 for settings in tiles.values()):
        raise UserError(f"{KEY}: {folder} is a LoRA; method.name must be qlora")
    _require_plain_lora(config, folder)
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        path, _, kind = name.removesuffix(".weight").rpartition(".lora_")
        ours = next((each for each in tiles if path == each or path.endswith(f".{each}")), None)
        if kind not in ("A", "B") or ours is None:
            raise UserError(f"{KEY}: {folder} has {name}, which is not a LoRA of a layer that method.targets selects")
        found[f"{ours}.{kind}"] = _fitting(tensor, name, kind, tiles[ours], _scale(config, path, tensor, kind), folder)
    missing = [path for path in tiles if not {f"{path}.A", f"{path}.B"} <= found.keys()]
    if missing:
        raise UserError(f"{KEY}: {folder} has no LoRA of {missing[0]} ({len(missing)} of {len(tiles)} layers missing)")
    tokens = spec.tokens if isinstance(spec, AdapterSpec) else None
    if tokens is not None:  # of which the folder has none, so they begin at the base's
        found |= {name: torch.zeros(shape) for name, shape in tokens.shapes().items()}
    return found


def _require_plain_lora(config: dict[str, Any], folder: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise UserError(f"{KEY}: {folder}: peft_type is {config.get('peft_type')!r}, must be 'LORA'")
    used = [key for key in _UNKNOWN_TO_US if config.get(key)]
    if config.get("bias", "none") != "none":
        used.append("bias")
    if used:
        raise UserError(f"{KEY}: {folder}: it uses {used[0]}, which qlora has not")


def _scale(config: dict[str, Any], path: str, tensor: Tensor, kind: str) -> float:
    """The factor of B A in PEFT: alpha / r, or alpha / sqrt(r) with rank-stabilized scaling."""
    rank = tensor.shape[0 if kind == "A" else -1]
    patterns = config.get("alpha_pattern") or {}
    own = [value for key, value in patterns.items() if path == key or path.endswith(f".{key}")]
    alpha = own[0] if own else config.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise CorruptFileError(f"{PEFT_CONFIG}: lora_alpha is {alpha!r}, must be a number")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _fitting(tensor: Tensor, name: str, kind: str, settings: TileSettings, scale: float, folder: Path) -> Tensor:
    """A or B in float32 for an adapter of ours; UserError if its shape is another."""
    shape = settings.shapes()[kind]
    if tuple(tensor.shape) != shape:
        raise UserError(
            f"{KEY}: {folder}: {name} is {list(tensor.shape)}, must be {list(shape)} (method.rank {settings.rank})"
        )
    return tensor.float() * (scale / settings.scale) if kind == "B" else tensor.float()
