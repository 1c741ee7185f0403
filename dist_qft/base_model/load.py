"""Streaming a base into an engine: read, quantize, keep the own rows, drop the rest, a few rows at a time.

A rank reads and quantizes only the rows it keeps wherever the format allows it (blocks never cross the row
range), so loading takes 1/N of the work on N ranks. The peak is the own shard plus a few MiB, or plus one tensor for
a format whose rows cannot be quantized alone. Weights are quantized on the CPU, whatever the run's device: the same
bits come out everywhere.

The fingerprint of a base is the SHA-256 of all names, shapes, formats and additive digests of the packed
tensors; norms and biases count with their float32 value as read from the file. It depends neither on the
world size, nor on the engine, nor on the compute dtype.
"""

import hashlib
import json
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dist_qft.base_model.skeleton import BaseModel
from dist_qft.base_model.sources import TensorSource, require_finite
from dist_qft.base_model.weight_files import check_stored_formats
from dist_qft.errors import UserError
from dist_qft.quant.frozen import FrozenEmbedding, FrozenLinear
from dist_qft.ranks.digest import positional_digest
from dist_qft.sharding.engine import Engine
from dist_qft.sharding.host_memory import return_freed_memory

# Weights taken at a time: bounds the temporaries to some MiB.
_QUANTIZED = 1 << 18
_READ = 1 << 21  # as the file holds them
_LARGE = 1 << 22  # weights: freed memory is given back after such a matrix, and after each decoder layer


class Fingerprint:
    """Collects additive digests part by part; one sum over the shards turns them into the whole's."""

    def __init__(self) -> None:
        self.digests: dict[str, Tensor] = {}

    def add(self, label: str, part: Tensor, start: int) -> None:
        """Count `part`, whose first element is element `start` of the tensor called `label`."""
        digest = positional_digest(part, start).cpu()
        self.digests[label] = self.digests[label] + digest if label in self.digests else digest

    def hexdigest(self, engine: Engine, device: torch.device) -> str:
        digests = engine.sum_over_shards(torch.stack(list(self.digests.values())).to(device))
        pairs = sorted(zip(self.digests, digests.tolist(), strict=True))
        return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def check_names(base: BaseModel, source: TensorSource) -> dict[str, str]:
    """Model tensor name -> source tensor name, for all the base needs.

    Raises:
        UserError: missing tensors, a vocabulary or layer of another shape, weights that are quantized in another way;
            before anything is read.
    """
    check_stored_formats(source, base.linears, base.tables())
    stored = source.names()
    prefix = base.model.base_model_prefix + "."
    found, missing = {}, []
    for name in base.shapes:
        # Some published checkpoints were saved from the bare decoder, without the causal LM's prefix.
        choices = [name, name.removeprefix(prefix), prefix + name]
        match = next((choice for choice in choices if choice in stored), None)
        if match is None:
            missing.append(name)
        else:
            found[name] = match
    if missing:
        raise UserError(f"{source.where}: has no tensor '{missing[0]}' ({len(missing)} of {len(base.shapes)} missing)")
    for name, shape in base.shapes.items():
        if source.shape(found[name]) != shape:
            raise UserError(
                f"{source.where}: tensor '{found[name]}' is {list(source.shape(found[name]))}, "
                f"the configuration says {list(shape)}"
            )
    return found


@torch.no_grad()
def load_base(
    base: BaseModel, source: TensorSource, engine: Engine, device: torch.device, poll: Callable[[], None] | None = None
) -> None:
    """Fill a skeleton that `engine` has sharded; sets `base.fingerprint`. Collective.

    poll: called after each decoder layer, by all ranks alike; what it raises ends the loading.
    """
    names = check_names(base, source)
    fingerprint = Fingerprint()
    modules: dict[str, FrozenLinear | FrozenEmbedding] = {**base.linears, **base.tables()}
    depths = [base.depth_of(path) for path in modules]
    for (path, module), depth, next_depth in zip(modules.items(), depths, [*depths[1:], None], strict=True):
        _load_packed(names[f"{path}.weight"], path, module, source, engine, fingerprint)
        layer_done = depth != next_depth
        if layer_done or math.prod(module.weight_shape) > _LARGE:
            return_freed_memory()
        if layer_done and poll is not None:
            poll()
    for name, parameter in base.dense_parameters():
        first, stop = engine.rows(parameter)
        rows = source.read(names[name], (first, stop))
        require_finite(source, names[name], rows)
        engine.store(parameter, first, rows.to(parameter.dtype))
        own = _own_elements(rows.float(), first, parameter, engine)
        fingerprint.add(f"{name} {list(engine.shape(parameter))} dense", *own)
    base.fingerprint = fingerprint.hexdigest(engine, device)


def _load_packed(
    name: str,
    path: str,
    module: FrozenLinear | FrozenEmbedding,
    source: TensorSource,
    engine: Engine,
    fingerprint: Fingerprint,
) -> None:
    """Hand the rows that this rank keeps of one matrix to the engine, quantized unless the file has them so."""
    label = json.dumps(module.format.describe(), sort_keys=True)
    held = source.holds(name, module.format)
    for first, stop in _row_ranges(module, *_rows_needed(module, engine), _READ if held else _QUANTIZED):
        if held:
            packed = source.read_packed(name, module.format, (first, stop))
        else:
            where = f"{source.where}: rows {first} to {stop} of tensor '{name}'"
            packed = module.format.quantize(source.read(name, (first, stop)), where)
        for key, parameter in module.packed().items():
            per_entry = module.format.rows_per_entry(key)
            offset = 0 if per_entry is None else first // per_entry
            engine.store(parameter, offset, packed[key].to(parameter.dtype))
            own = _own_elements(packed[key], offset, parameter, engine)
            fingerprint.add(f"{path}.{key} {list(engine.shape(parameter))} {label}", *own)


def _own_elements(rows: Tensor, first: int, parameter: nn.Parameter, engine: Engine) -> tuple[Tensor, int]:
    """What this rank keeps of some `rows` of a parameter, from row `first` on, and the index of its first element."""
    begin, end = engine.span(parameter)
    offset = first * math.prod(engine.shape(parameter)[1:])
    start = max(begin, offset)
    return rows.reshape(-1)[start - offset : max(end, start) - offset], start


def _row_ranges(module: FrozenLinear | FrozenEmbedding, first: int, stop: int, weights: int) -> list[tuple[int, int]]:
    """The rows first..stop in pieces of so many weights that can stand alone; one empty piece if there are none."""
    if not module.format.row_local or first == stop:
        return [(first, stop)]
    align = module.format.row_alignment
    step = max(1, weights // (module.weight_shape[1] * align)) * align
    return [(start, min(start + step, stop)) for start in range(first, stop, step)]


def _rows_needed(module: FrozenLinear | FrozenEmbedding, engine: Engine) -> tuple[int, int]:
    """Weight rows from which all of this rank's packed entries can be computed."""
    height = module.weight_shape[0]
    if not module.format.row_local:
        return 0, height
    first, stop = height, 0
    for key, parameter in module.packed().items():
        per_entry = module.format.rows_per_entry(key)
        begin, end = engine.rows(parameter)
        if end > begin:
            first, stop = min(first, begin * per_entry), max(stop, end * per_entry)
    align = module.format.row_alignment
    return (first // align * align, min(height, -(-stop // align) * align)) if stop else (0, 0)
