"""From a config to live parts: what training, evaluation, generation and merging all begin with."""

from dataclasses import dataclass

import torch

from dist_qft.base_model.load import load_base
from dist_qft.base_model.skeleton import BaseModel
from dist_qft.base_model.sources import TensorSource, open_source
from dist_qft.checkpoint import Checkpoint
from dist_qft.collectives import agreed
from dist_qft.config.schema import RunConfig
from dist_qft.config.zero_file import read_zero_options
from dist_qft.errors import UserError
from dist_qft.methods.attach import AdapterSet
from dist_qft.methods.schedule import LinearShape, TileSettings
from dist_qft.sharding.engine import Engine, make_engine

ADAPTER_TYPE = "DIST_QFT_TILE"  # not a PEFT name: other loaders must fail loudly, not serve the bare base


@dataclass(frozen=True)
class Assembled:
    """A loaded base with its adapters attached."""

    base: BaseModel
    engine: Engine
    adapters: AdapterSet


def compute_dtype(setting: str, device: torch.device) -> torch.dtype:
    """The dtype of activations: `auto` is bfloat16 on CUDA and float32 on CPUs (most have no bf16 units)."""
    if setting == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[setting]


def linear_shapes(base: BaseModel) -> list[LinearShape]:
    """The base's linear layers as the method's schedule sees them, in model order."""
    return [
        LinearShape(path, layer.in_features, layer.out_features, base.depth_of(path))
        for path, layer in base.linears.items()
    ]


def assemble(
    config: RunConfig,
    skeleton: BaseModel,
    plan: dict[str, TileSettings],
    device: torch.device,
    source: TensorSource | None = None,
) -> Assembled:
    """Shard and load the base, build the adapters and hook them on. Collective; the heavy part of a start.

    `source` holds the base's weights; without it, `model.path` is opened here.
    """
    sharding = config.sharding
    engine = make_engine(
        sharding.engine,
        reshard_after_forward=sharding.reshard_after_forward,
        prefetch_bytes=int(sharding.prefetch_megabytes * 2**20),
        offload=sharding.offload,
        zero_options=read_zero_options(config),
    )
    engine.shard(skeleton.units, device)
    _move_buffers(skeleton, device)
    load_base(skeleton, source or open_source(config.model), engine, device)
    skeleton.head.loss_megabytes = config.train.loss_chunk_megabytes
    adapters = AdapterSet.build(plan, config.train.seed).to(device)
    adapters.attach(skeleton.model)
    return Assembled(skeleton, engine, adapters)


def adapter_config(config: RunConfig, base: BaseModel, plan: dict[str, TileSettings]) -> dict:
    """What an adapter file must say about itself to be loaded, checked and merged later."""
    return {
        "peft_type": ADAPTER_TYPE,
        "format_version": 1,
        "method": config.method.name,
        "base_model_name_or_path": config.model.path,
        "base_fingerprint": base.fingerprint,
        "tiles": {path: settings.to_dict() for path, settings in plan.items()},
        "run_config": config.model_dump(),
    }


def check_adapter(checkpoint: Checkpoint, plan: dict[str, TileSettings]) -> None:
    """Refuse a checkpoint whose adapters are not those of the config; before the base is loaded."""
    found = checkpoint.adapter_config
    if found.get("peft_type") != ADAPTER_TYPE:
        raise UserError(f"{checkpoint.path}: peft_type is {found.get('peft_type')!r}, need {ADAPTER_TYPE!r}")
    saved, wanted = found.get("tiles", {}), {path: settings.to_dict() for path, settings in plan.items()}
    for path in sorted({*saved, *wanted}):
        before, now = saved.get(path, {}), wanted.get(path, {})
        if before != now:
            changes = [
                f"{key} was {before.get(key, 'absent')}, the config says {now.get(key, 'absent')}"
                for key in {**before, **now}
                if before.get(key) != now.get(key)
            ]
            raise UserError(f"{checkpoint.path}: adapter of {path}: {'; '.join(changes)}")


def check_fingerprint(checkpoint: Checkpoint, base: BaseModel) -> None:
    """Refuse an adapter that was trained on another base, or on another quantization of it. Alike on all ranks."""
    expected = str(checkpoint.adapter_config.get("base_fingerprint"))
    if expected != base.fingerprint:
        raise agreed(
            UserError(
                f"{checkpoint.path}: trained on base {expected[:16]}..., "
                f"this base is {base.fingerprint[:16]}... (another model or another quantization)"
            )
        )


def _move_buffers(base: BaseModel, device: torch.device) -> None:
    for module in base.model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
