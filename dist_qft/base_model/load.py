"""Streaming a base into an engine: read, quantize, keep the own rows, drop the rest, a few rows at a time.

A rank reads and quantizes only the rows it keeps (blocks never cross the row range), so loading takes 1/N of the work
on N ranks. The peak is the own shard plus a few MiB; for constants that are themselves quantized (nf4 with
double_quant), plus the float constants of one tensor, which the ranks sum up. Weights are quantized on the CPU,
whatever the run's device: the same bits come out everywhere.

The fingerprint of a base is the SHA-256 of all names, shapes, formats and additive digests of the packed
tensors; norms and biases count with their float32 value as read from the file. It depends neither on the
world size, nor on the engine, nor on the compute dtype.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from dist_qft.base_model.model_tensors import ModelTensors, check_names
from dist_qft.base_model.skeleton import BaseModel
from dist_qft.base_model.sources import TensorSource, require_finite
from dist_qft.quant.contract import Format, Shape, row_entries
from dist_qft.quant.frozen import FrozenWeight
from dist_qft.ranks.collectives import require_same_inputs
from dist_qft.ranks.digest import positional_digest
from dist_qft.sharding.engine import Engine
from dist_qft.sharding.host_memory import return_freed_memory

# Weights taken at a time: bounds the temporaries to some MiB.
_QUANTIZED = 1 << 18
_READ = 1 << 21  # as the file holds them
_LARGE = 1 << 22  # weights: freed memory is given back after such a matrix, and after each decoder layer


class Fingerprint:
    """A collection of additive digests of parts; one sum over the shards turns them into the whole's."""

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


@torch.no_grad()
def load_base(
    base: BaseModel, source: TensorSource, engine: Engine, device: torch.device, poll: Callable[[], None] | None = None
) -> None:
    """Fill a skeleton that `engine` has sharded; sets `base.fingerprint`. Collective.

    Every group of ranks that holds a whole base reads its own files; they are compared by their fingerprints.

    Raises:
        UserError: the files differ between ranks; on all ranks.

    poll: called after each decoder layer, by all ranks alike; an error that it raises ends the loading.
    """
    tensors = check_names(base, source)
    fingerprint = Fingerprint()
    modules = base.weights()
    depths = [base.depth_of(path) for path in modules]
    for (path, module), depth, next_depth in zip(modules.items(), depths, [*depths[1:], None], strict=True):
        _load_packed(path, module, tensors, engine, fingerprint)
        layer_done = depth != next_depth
        if layer_done or math.prod(module.weight_shape) > _LARGE:
            return_freed_memory()
        if layer_done and poll is not None:
            poll()
    for name, parameter in base.dense_parameters():
        first, stop = engine.rows(parameter)
        rows = tensors.read(name, (first, stop))
        require_finite(source, tensors.stored_name(name), rows)
        engine.store(parameter, first, rows.to(parameter.dtype))
        own = _own_elements(rows.float(), first, parameter, engine)
        fingerprint.add(f"{name} {list(engine.shape(parameter))} dense", *own)
    _load_buffers(base, tensors, engine, fingerprint)
    base.fingerprint = fingerprint.hexdigest(engine, device)
    require_same_inputs({"weights of the base": base.fingerprint}, device)


def _load_buffers(base: BaseModel, tensors: ModelTensors, engine: Engine, fingerprint: Fingerprint) -> None:
    """Read the buffers, whole on every rank. The rank with the embedding's first element counts them."""
    first, stop = engine.span(next(base.embedding.parameters()))
    counts = first == 0 < stop
    for name, shape in base.buffers.items():
        if name not in tensors:
            continue
        value, buffer = tensors.read(name), base.model.get_buffer(name)
        if value.is_floating_point():
            require_finite(tensors.source, tensors.stored_name(name), value)
        buffer.copy_(value)
        digits = value.float() if buffer.is_floating_point() else value.long()
        fingerprint.add(f"{name} {list(shape)} buffer", digits.reshape(-1)[: None if counts else 0], 0)


class _Loading:
    """One matrix on its way into the engine: its packed tensors are stored and counted as they come, by rows."""

    def __init__(self, path: str, module: FrozenWeight, engine: Engine, fingerprint: Fingerprint) -> None:
        self._path, self._engine, self._fingerprint = path, engine, fingerprint
        self._label = json.dumps(module.format.describe(), sort_keys=True)
        self.format, self.height = module.format, module.weight_shape[0]
        self.parameters = {name: getattr(module, name) for name in module.packed()}

    def take(self, packed: Mapping[str, Tensor], first: int, stop: int, *, whole: bool) -> None:
        """Hand the rows first..stop to the engine; tensors that all rows share, if `whole`, too."""
        for name, parameter in self.parameters.items():  # in the same order on every rank, for the fingerprint
            if name not in packed:
                continue
            if self.format.shared(name):
                if whole:
                    self._store(name, packed[name], 0)
                continue
            start, _ = row_entries(self._engine.shape(parameter)[0], self.height, first, stop)
            self._store(name, packed[name], start)

    def _store(self, name: str, entries: Tensor, start: int) -> None:
        parameter = self.parameters[name]
        self._engine.store(parameter, start, entries.to(parameter.dtype))
        own = _own_elements(entries, start, parameter, self._engine)
        self._fingerprint.add(f"{self._path}.{name} {list(self._engine.shape(parameter))} {self._label}", *own)


def _load_packed(
    path: str, module: FrozenWeight, tensors: ModelTensors, engine: Engine, fingerprint: Fingerprint
) -> None:
    """Hand the rows that this rank keeps of one matrix to the engine, quantized unless the file has their codes.

    Collective for a format that is not `row_local` and is quantized here.
    """
    name = f"{path}.weight"
    loading = _Loading(path, module, engine, fingerprint)
    tensor = f"tensor '{tensors.stored_name(name)}'"
    stored = tensors.stored_format(name)
    if stored is not None and module.format.keeps_codes_of(stored):
        for index, (first, stop) in enumerate(_own_rows(module, engine, _READ)):
            packed = tensors.read_packed(name, (first, stop))
            packed = module.format.from_stored(packed, stored, f"{tensors.where}: {tensor}")
            loading.take(packed, first, stop, whole=index == 0)
        return
    row_format = module.format.row_format or module.format
    constants: dict[str, Tensor] = {}
    for index, (first, stop) in enumerate(_own_rows(module, engine, _QUANTIZED)):
        where = f"{tensors.where}: rows {first} to {stop} of {tensor}"
        packed = row_format.quantize(tensors.read_rows(name, first, stop), where)
        loading.take(packed, first, stop, whole=index == 0)
        if row_format is not module.format:
            _collect(constants, packed, loading, row_format, module.weight_shape, (first, stop))
    if row_format is not module.format:
        _second_pass(constants, loading, engine)


def _collect(
    constants: dict[str, Tensor],
    packed: Mapping[str, Tensor],
    loading: _Loading,
    row_format: Format,
    shape: Shape,
    rows: tuple[int, int],
) -> None:
    """Put the tensors of some rows that only the whole weight's second pass needs into buffers for all rows."""
    for name, (whole_shape, dtype) in row_format.packed_shapes(shape).items():
        if name in loading.parameters:
            continue
        if name not in constants:
            constants[name] = torch.zeros(whole_shape, dtype=dtype)
        start, stop = row_entries(whole_shape[0], shape[0], *rows)
        constants[name][start:stop] = packed[name]


def _second_pass(constants: Mapping[str, Tensor], loading: _Loading, engine: Engine) -> None:
    """Complete the constants with the other ranks' rows, and load the tensors that follow from all of them.

    Collective. The codes' rows say whose constants count: the rank that keeps the first element of a row. Ranks whose
    parts end within the same row have both read it.
    """
    codes = next(parameter for name, parameter in loading.parameters.items() if not loading.format.shared(name))
    width = math.prod(engine.shape(codes)[1:])
    begin, end = engine.span(codes)
    first, stop = -(-begin // width), -(-end // width)
    whole = {}
    for name, tensor in constants.items():
        bits = torch.zeros(tensor.shape, dtype=torch.int64)
        bits[first:stop] = tensor.view(torch.int32)[first:stop]
        summed = engine.sum_over_shards(bits.to(codes.device)).cpu()
        whole[name] = summed.to(torch.int32).view(tensor.dtype)
    packed = loading.format.second_pass(whole)
    loading.take(packed, 0, loading.height, whole=True)


def _own_elements(rows: Tensor, first: int, parameter: nn.Parameter, engine: Engine) -> tuple[Tensor, int]:
    """This rank's elements among some `rows` of a parameter, from row `first` on; and the index of the first."""
    begin, end = engine.span(parameter)
    offset = first * math.prod(engine.shape(parameter)[1:])
    start = max(begin, offset)
    return rows.reshape(-1)[start - offset : max(end, start) - offset], start


def _own_rows(module: FrozenWeight, engine: Engine, weights: int) -> list[tuple[int, int]]:
    """The rows that this rank must read of a matrix, in pieces of so many weights; one empty piece if it keeps none."""
    first, stop = _rows_needed(module, engine)
    if first == stop:
        return [(first, stop)]
    align = module.format.row_alignment
    step = max(1, weights // (module.weight_shape[1] * align)) * align
    return [(start, min(start + step, stop)) for start in range(first, stop, step)]


def _rows_needed(module: FrozenWeight, engine: Engine) -> tuple[int, int]:
    """Weight rows from which all of this rank's packed entries can be computed."""
    height = module.weight_shape[0]
    first, stop = height, 0
    for name, parameter in module.packed().items():
        begin, end = engine.rows(parameter)
        if module.format.shared(name) or begin >= end:
            continue
        entries = engine.shape(parameter)[0]
        first, stop = min(first, begin * height // entries), max(stop, -(-end * height // entries))
    align = module.format.row_alignment
    return (first // align * align, min(height, -(-stop // align) * align)) if stop else (0, 0)
