"""The names of runs, and the keys by which runs share a base: digests of the settings that decide."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch

from dist_qft.base_model.skeleton import BaseModel, build_skeleton
from dist_qft.config.renamed import with_earlier_names
from dist_qft.config.schema import RunConfig
from dist_qft.methods.adapters.adapter_spec import AdapterSpec
from dist_qft.methods.trainable import TrainableSpec
from dist_qft.ranks.device import compute_dtype, planned_device
from dist_qft.study.stages import MergeStage


def run_name(config: RunConfig, spec: TrainableSpec[Any], merge: MergeStage | None, tasks: Sequence[str]) -> str:
    """The method, and a digest of all settings that decide the run's results."""
    # Without defaults: a setting that later versions add must not rename the runs of today.
    settings = config.model_dump(exclude={"output_dir": True, "data": {"cache_dir"}}, exclude_defaults=True)
    settings = with_earlier_names(settings)
    if isinstance(spec, AdapterSpec):
        # The spec says it layer by layer, in one way only. qlora's name is left out since the first version.
        settings["method"] = {} if config.method.name == "qlora" else {"name": config.method.name}
        if not spec.leaves_base_clean:
            settings["method"]["merge_aware"] = True
        if config.method.init_from is not None:
            settings["method"]["init_from"] = config.method.init_from
    else:
        settings["method"] = config.method.model_dump(exclude_unset=True)
    if merge is not None:
        settings["merged"] = merge.model_dump(exclude={"when"}, exclude_defaults=True)
    if tasks:
        settings["tasks"] = list(tasks)
    text = json.dumps([settings, spec.describe()], sort_keys=True)
    return f"{config.method.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def base_key(config: RunConfig, spec: TrainableSpec[Any]) -> str:
    """Runs with equal keys reuse one loaded base. A run that changes its base for good gets a key of its own."""
    if not spec.leaves_base_clean:
        return config.output_dir
    parts = config.model_dump(include={"model", "quantization", "sharding"})
    train = config.train.model_dump(include={"precision", "gradient_checkpointing"})
    # The base is kept with its tokenizer, which has the run's template.
    template = [config.data.template] if config.data is not None and config.data.template != "chat" else []
    return json.dumps([parts, train, *template], sort_keys=True)


class Skeletons:
    """Bases on the meta device, one for each model and quantization."""

    def __init__(self) -> None:
        self._known: dict[str, BaseModel] = {}

    def get(self, config: RunConfig) -> BaseModel:
        dtype: torch.dtype = compute_dtype(config.train.precision, planned_device(config.sharding.device))
        key = f"{config.model} {config.quantization} {dtype}"
        if key not in self._known:
            self._known[key] = build_skeleton(config.model, config.quantization, dtype)
        return self._known[key]
