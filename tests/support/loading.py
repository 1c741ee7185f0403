"""A base loaded by the ranks of a pool, and what it is known by."""

from pathlib import Path
from typing import Any

import torch

from dist_qft.base_model.load import load_base
from dist_qft.base_model.skeleton import build_skeleton
from dist_qft.base_model.weight_files import open_source
from dist_qft.config.schema import ModelConfig, QuantizationConfig
from dist_qft.sharding.engines import make_engine


def loaded_fingerprint(path: Path, engine_name: str, quantization: dict[str, Any], attention: str = "sdpa") -> str:
    """The fingerprint of the model at `path`, read on all ranks in float32. Collective."""
    model, device = ModelConfig(path=str(path), attention=attention), torch.device("cpu")
    base = build_skeleton(model, QuantizationConfig(**quantization), torch.float32)
    engine = make_engine(engine_name)
    engine.shard(base.units, device)
    load_base(base, open_source(model), engine, device)
    return base.fingerprint
