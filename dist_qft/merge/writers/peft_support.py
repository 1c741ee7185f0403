"""Adapters that stock PEFT does not load rightly: those of experts and state-space layers, and those too large."""

from collections.abc import Mapping

from transformers import conversion_mapping

from dist_qft.base_model.skeleton import BaseModel
from dist_qft.errors import UserError
from dist_qft.methods.adapters.schedule import TileSettings

# PEFT's own tables; `tests/unit/merge/test_peft_tables.py` compares them with the installed PEFT.
_CONVERSIONS: Mapping[str, str] = {
    **getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {}),
    "mixtral": "mixtral",
}
_EXPERT_NAMES = {"mixtral": ("gate", "w1", "w2", "w3"), "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj")}
_MAMBA_TYPES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
_MAMBA_NAMES = ("out_proj", "conv1d")


def require_peft_support(model_type: str, tiles: Mapping[str, TileSettings]) -> None:
    """Refuse adapters that stock PEFT would not load, or would drop with no more than a warning. UserError.

    For mixtures of experts PEFT takes every layer whose name was once an expert's for a stacked parameter, dense layers
    included (`peft.utils.transformers_weight_conversion`). For state-space models it refuses `out_proj`
    (`peft.tuners.tuners_utils`).
    """
    expert_names = _EXPERT_NAMES.get(_CONVERSIONS.get(model_type, model_type), ())
    for path, settings in tiles.items():
        leaf = path.rsplit(".", 1)[-1]
        if settings.experts is not None:
            reason = "adapters on experts are not written for PEFT, which keeps them as LoRAs of stacked parameters"
        elif leaf in expert_names:
            reason = f"for model type '{model_type}' PEFT takes {leaf} for experts and drops these adapters"
        elif model_type in _MAMBA_TYPES and leaf in _MAMBA_NAMES:
            reason = f"for model type '{model_type}' PEFT refuses to load adapters on {leaf}"
        else:
            continue
        raise UserError(
            f"--to peft: {path}: {reason}; merge --to dense or quantized, or train without {leaf} (method.targets, or "
            "a schedule rule with skip)"
        )


def require_token_support(base: BaseModel) -> None:
    """Refuse trained rows of an LM head with a bias: PEFT's `TrainableTokensLayer` leaves that out. UserError."""
    if any(table.bias is not None for table in base.tables().values()):
        raise UserError(
            "--to peft: method.train_tokens changes rows of an LM head with a bias, which PEFT leaves out where it has "
            "such rows; merge --to dense or quantized"
        )


def lora_rank(settings: TileSettings) -> int:
    """Rank of the LoRA that equals this adapter."""
    if settings.inner is not None:
        return settings.inner
    return min(settings.out_features // settings.repeat, settings.in_features // settings.pool)


def require_low_rank(path: str, settings: TileSettings) -> None:
    """Refuse an adapter whose LoRA pair would hold as many numbers as dW itself."""
    rank, rows, columns = lora_rank(settings), settings.out_features, settings.in_features
    if rank * (rows + columns) >= rows * columns:
        raise UserError(
            f"--to peft: dW of {path} has rank {rank}, a LoRA of that rank is no smaller than the {rows} x {columns} "
            "matrix itself; merge --to dense or quantized, or train without this layer (method.targets, or a schedule "
            "rule with skip)"
        )
