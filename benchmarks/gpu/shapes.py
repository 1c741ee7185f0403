"""A model of random weights, which no file holds, loaded and merged as one of files is."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_qft.base_model.skeleton import BaseModel, build_skeleton
from dist_qft.base_model.sources import FloatSource, Rows
from dist_qft.config.schema import RunConfig
from dist_qft.methods.adapters.attach import AdapterSet
from dist_qft.methods.adapters.exact_fold import folded, zeros_of
from dist_qft.methods.specs import make_spec
from dist_qft.sharding.engine import Engine
from dist_qft.sharding.engines import engine_of
from dist_qft.tuned_model.assemble import attach_trainables, materialize


@dataclass(frozen=True)
class RandomWeights(FloatSource):
    """A source of a base's tensors, made on `device` when they are read, and read on the CPU as those of files are."""

    shapes: dict[str, tuple[int, ...]]
    device: torch.device
    where: str = "random weights"

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return self.shapes[name]

    def is_float(self, name: str) -> bool:
        """Always."""
        return True

    def read(self, name: str, rows: Rows = None) -> Tensor:
        """Other values with each call."""
        height, *others = self.shapes[name]
        count = height if rows is None else rows[1] - rows[0]
        return (torch.randn(count, *others, device=self.device) * 0.02).bfloat16().cpu()


def loaded(config: RunConfig, device: torch.device) -> tuple[BaseModel, Engine, float]:
    """A base of random weights with the engine that holds it, and the seconds that it took."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    base, engine = build_skeleton(config.model, config.quantization, dtype), engine_of(config)
    started = time.perf_counter()
    materialize(base, RandomWeights(base.shapes, device), engine, device)
    return base, engine, time.perf_counter() - started


@torch.no_grad()
def merged(config: RunConfig, device: torch.device) -> tuple[float, int]:
    """Seconds in which all adapters are folded into the base's zeros, and these copied to the CPU; their number."""
    base, engine, _ = loaded(config, device)
    parts = attach_trainables(config, base, engine, make_spec(config, base), device)
    assert isinstance(parts.trainables, AdapterSet), "a method that folds"
    count, started = 0, time.perf_counter()
    for path, adapter in parts.trainables.by_path.items():
        layer = base.matrices[path]
        target = zeros_of(layer.format)
        parameter = getattr(layer, target.tensor)
        part = engine.local(parameter).view(-1)
        written, _ = folded(part, 0, parameter.shape[1], target.block, adapter)
        part.copy_(written)
        gathered = engine.gather(parameter)
        count += 0 if gathered is None else gathered.numel()
    return time.perf_counter() - started, count
