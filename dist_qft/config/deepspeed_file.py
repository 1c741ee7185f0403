"""The user's own DeepSpeed JSON (`sharding.deepspeed_config`): the settings of it that are used, and those that
contradict this config.

Engine `zero` gives DeepSpeed the frozen base and nothing else, so most of such a file is decided here and not there. A
value that agrees with ours, or "auto" as Hugging Face writes it, is accepted; another value is a fault that names both
keys; a key that would have no effect is a fault too. Nothing here imports DeepSpeed.
"""

import json
from collections.abc import Iterator
from typing import Any

from dist_qft.config.paths import read_bounded
from dist_qft.config.schema import RunConfig
from dist_qft.errors import UserError

# Left to the user: settings that change neither what is computed nor what is resident.
_FREE = (
    "zero_optimization.overlap_comm",
    "zero_optimization.offload_param.pin_memory",
    "zero_optimization.stage3_allgather_sequential",
    "zero_optimization.enable_sanity_checks",
)

# Sections and keys that a setting of ours replaces.
_REPLACED = {
    "activation_checkpointing": "train.gradient_checkpointing",
    "gradient_accumulation_steps": "train.global_batch_size",
    "optimizer": "train.optim",
    "scheduler": "train.lr_scheduler_type",
    "zero_optimization.zero_hpz_partition_size": "sharding.group",
    "zero_optimization.mics_shard_size": "sharding.group",
    "zero_optimization.stage3_max_live_parameters": "sharding.prefetch_megabytes",
    "zero_optimization.stage3_prefetch_bucket_size": "sharding.prefetch_megabytes",
}


def _decided(config: RunConfig) -> dict[str, tuple[Any, str]]:
    """DeepSpeed's key -> the value it must have, and the key of ours that says so."""
    train, sharding = config.train, config.sharding
    return {
        "train_batch_size": (train.global_batch_size, "train.global_batch_size"),
        "train_micro_batch_size_per_gpu": (train.per_device_train_batch_size, "train.per_device_train_batch_size"),
        "gradient_clipping": (train.max_grad_norm, "train.max_grad_norm"),
        **_decided_dtype(config),
        "fp16.enabled": (False, "train.precision"),
        "zero_optimization.stage": (3, "sharding.engine"),
        "zero_optimization.offload_param.device": ("cpu" if sharding.offload else "none", "sharding.offload"),
        # Anything but 0 keeps gathered layers whole: the sharding would be undone without a word.
        "zero_optimization.stage3_max_reuse_distance": (0, "sharding.engine"),
        "zero_optimization.stage3_param_persistence_threshold": (0, "sharding.engine"),
    }


def _decided_dtype(config: RunConfig) -> dict[str, tuple[Any, str]]:
    """bf16's entry; none where the machines of the run decide, which this one, without a GPU, may not be one of."""
    from dist_qft.ranks.device import compute_dtype, dtype_name, planned_device  # imports torch

    precision, device = config.train.precision, planned_device(config.sharding.device)
    if precision == "auto" and config.sharding.device == "auto" and device.type == "cpu":
        return {}
    return {"bf16.enabled": (dtype_name(compute_dtype(precision, device)) == "bfloat16", "train.precision")}


def zero_file_faults(config: RunConfig) -> Iterator[str]:
    """The faults of the file, one line for each key."""
    path = config.sharding.deepspeed_config
    if path is None:
        return
    try:
        entries = list(_entries(json.loads(read_bounded(path))))
    except OSError as error:
        yield f"cannot read '{path}': {error.strerror}"
        return
    except (ValueError, RecursionError) as error:
        yield f"'{path}' is not a JSON object: {error}"
        return
    decided = _decided(config)
    for key, value in entries:
        replaced = next((ours for part, ours in _REPLACED.items() if f"{key}.".startswith(f"{part}.")), None)
        if value == "auto":
            continue
        if key in decided:
            ours, name = decided[key]
            if value != ours or isinstance(value, bool) != isinstance(ours, bool):
                yield f"'{path}' has {key} {json.dumps(value)}, {name} means {json.dumps(ours)}; they must agree"
        elif replaced is not None:
            yield f"'{path}' has {key}, which {replaced} decides; remove it there"
        elif key not in _FREE:
            yield f"'{path}' has {key}, which has no effect on a frozen base; remove it. Used: {', '.join(_FREE)}"
        elif not isinstance(value, bool):
            yield f"'{path}' has {key} {json.dumps(value)}, must be true or false"


def read_zero_options(config: RunConfig) -> dict[str, Any]:
    """The `zero_optimization` settings of the file that are the user's to choose; empty without a file.

    Raises:
        UserError: the first of `zero_file_faults`.
    """
    path = config.sharding.deepspeed_config
    if path is None:
        return {}
    for fault in zero_file_faults(config):
        raise UserError(f"sharding.deepspeed_config: {fault}")
    options: dict[str, Any] = {}
    for key, value in _entries(json.loads(read_bounded(path))):
        if key in _FREE and value != "auto":
            *sections, name = key.split(".")[1:]
            inner = options
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[name] = value
    return options


def _entries(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf."""
    if not isinstance(tree, dict):
        raise ValueError("its top is not an object")
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _entries(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
