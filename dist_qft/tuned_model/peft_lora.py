"""PEFT LoRA folders as starting values of `qlora`: pairs under our names, and rows of trained tokens."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_qft.errors import CorruptFileError, UserError
from dist_qft.methods.adapters.adapter_spec import AdapterSpec
from dist_qft.methods.adapters.schedule import TileSettings
from dist_qft.methods.adapters.token_rows import KEY as TOKENS_KEY
from dist_qft.methods.adapters.token_rows import TrainedTokens
from dist_qft.methods.trainable import TrainableSpec

KEY = "method.init_from"
PEFT_CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."  # of the names in a folder's file; patterns are for names without it
# Features that our LoRA lacks: a folder that uses one would lose something of it.
_UNKNOWN_TO_US = (
    *("use_dora", "modules_to_save", "layer_replication", "alora_invocation_tokens", "lora_bias", "use_qalora"),
    *("use_bdlora", "arrow_config", "kasa_config", "monteclora_config"),
)
# Values of init_lora_weights that leave the base as it is. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA take something off
# it, and their pairs are changes of what is left.
_BASE_AS_IT_IS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_ROWS = ".token_adapter.trainable_tokens_delta"  # PEFT's name; whole rows all the same


def read_peft_lora(
    folder: Path, config: dict[str, Any], tensors: Mapping[str, Tensor], spec: TrainableSpec[Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The pairs by our names, B rescaled from its alpha / r to ours, and whole rows of trained tokens by their table.

    Raises:
        UserError: the folder's layers, ranks or tokens are not those of the run, or it uses what `qlora` lacks.
        CorruptFileError: its config makes no sense.
    """
    tiles = spec.tiles if isinstance(spec, AdapterSpec) else {}
    if not tiles or any(settings.pool > 1 or settings.repeat > 1 for settings in tiles.values()):
        raise UserError(f"{KEY}: {folder} is a LoRA; method.name must be qlora")
    _require_plain_lora(config, folder)
    tokens = spec.tokens if isinstance(spec, AdapterSpec) else None
    rows = _token_rows(folder, config, tensors, tokens)
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(_ROWS):
            continue
        path, _, kind = name.removesuffix(".weight").rpartition(".lora_")
        ours = next((each for each in tiles if _ends_with(path, each)), None)
        if kind not in ("A", "B") or ours is None:
            raise UserError(f"{KEY}: {folder} has {name}, which is not a LoRA of a layer that method.targets selects")
        found[f"{ours}.{kind}"] = _fitting(tensor, name, kind, tiles[ours], _scale(config, path, tensor, kind), folder)
    missing = [path for path in tiles if not {f"{path}.A", f"{path}.B"} <= found.keys()]
    if missing:
        raise UserError(f"{KEY}: {folder} has no LoRA of {missing[0]} ({len(missing)} of {len(tiles)} layers missing)")
    if tokens is not None:  # rows that the folder lacks begin at the base's
        found |= {name: torch.zeros(shape) for name, shape in tokens.shapes().items()}
    return found, rows


def _token_rows(
    folder: Path, config: dict[str, Any], tensors: Mapping[str, Tensor], tokens: TrainedTokens | None
) -> dict[str, Tensor]:
    """The rows of the folder's trained tokens by their table's path, in ascending order of the tokens' ids."""
    indices = config.get("trainable_token_indices")
    if not indices:
        return {}
    embedding = next(iter(tokens.tables)) if tokens else ""
    by_table = indices if isinstance(indices, dict) else {embedding: indices}  # PEFT's default table
    if not all(_are_ids(ids) for ids in by_table.values()):
        raise CorruptFileError(f"{folder}: trainable_token_indices is {indices!r}, must be lists of token ids")
    if tokens is None:
        raise UserError(f"{TOKENS_KEY}: got nothing, must be {next(iter(by_table.values()))} as in {folder}")
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not name.endswith(_ROWS):
            continue
        place = name.removesuffix(_ROWS)
        ids = next((ids for table, ids in by_table.items() if _ends_with(place, table)), None)
        path = next((path for path in tokens.tables if _ends_with(place, path)), None)
        if path is None and tokens.tied:
            continue  # the LM head's name for the one table
        if path is None or ids is None:
            raise UserError(f"{KEY}: {folder} has {name}, must be rows of a table that {TOKENS_KEY} trains")
        if sorted(ids) != list(tokens.ids):
            raise UserError(f"{TOKENS_KEY}: got {list(tokens.ids)}, must be {sorted(ids)} as in {folder}")
        if tuple(tensor.shape) != (len(ids), tokens.tables[path]):
            size = [len(ids), tokens.tables[path]]
            raise UserError(f"{KEY}: {folder}: {name} is {list(tensor.shape)}, must be {size}")
        found[path] = tensor.float()[torch.tensor(ids).argsort()]
    if not found:
        raise CorruptFileError(f"{folder}: trainable_token_indices without the tokens' rows")
    return found


def _are_ids(ids: object) -> bool:
    return isinstance(ids, list) and bool(ids) and all(type(each) is int and each >= 0 for each in ids)


def _ends_with(path: str, name: str) -> bool:
    """True for a module's path that is `name`, or has it below a wrapper's prefixes."""
    return path == name or path.endswith(f".{name}")


def _require_plain_lora(config: dict[str, Any], folder: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise UserError(f"{KEY}: {folder}: peft_type is {config.get('peft_type')!r}, must be 'LORA'")
    used = [key for key in _UNKNOWN_TO_US if config.get(key)]
    if config.get("bias", "none") != "none":
        used.append("bias")
    if used:
        raise UserError(f"{KEY}: {folder}: it uses {used[0]}, which qlora has not")
    begun = config.get("init_lora_weights")
    if (begun.lower() if isinstance(begun, str) else begun) not in _BASE_AS_IT_IS:
        raise UserError(
            f"{KEY}: {folder}: init_lora_weights is {begun!r}, which changes the base, must be a LoRA of the base "
            "as it is (PEFT converts one by path_initial_model_for_weight_conversion)"
        )


def _scale(config: dict[str, Any], path: str, tensor: Tensor, kind: str) -> float:
    """The factor of B A in PEFT: alpha / r, or alpha / sqrt(r) with rank-stabilized scaling."""
    rank = tensor.shape[0 if kind == "A" else -1]
    alpha = _by_pattern(config.get("alpha_pattern") or {}, path, config.get("lora_alpha"))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise CorruptFileError(f"{PEFT_CONFIG}: lora_alpha is {alpha!r}, must be a number")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(patterns: object, path: str, default: object) -> object:
    """A layer's value by PEFT's rule: that of the first key, a regular expression, for all or the end of its name."""
    name = path.removeprefix(_PREFIX)
    wrong = CorruptFileError(f"{PEFT_CONFIG}: alpha_pattern is {patterns!r}, must be values by regular expressions")
    if not isinstance(patterns, dict):
        raise wrong
    try:
        return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)
    except re.error as error:
        raise wrong from error


def _fitting(tensor: Tensor, name: str, kind: str, settings: TileSettings, scale: float, folder: Path) -> Tensor:
    """A or B in float32 for an adapter of ours; UserError if its shape is another."""
    shape = settings.shapes()[kind]
    if tuple(tensor.shape) != shape:
        raise UserError(
            f"{KEY}: {folder}: {name} is {list(tensor.shape)}, must be {list(shape)} (method.rank {settings.rank})"
        )
    return tensor.float() * (scale / settings.scale) if kind == "B" else tensor.float()
