"""Notes on a base that comes quantized: one line for each kind of weight, with the error where there is one.

A weight that is quantized a second time differs from the published one, and no loss shows that. So each pair
of a stored and a wanted format gets a line with its error, measured on the first weights that it concerns.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from dist_qft.base_model.model_tensors import ModelTensors
from dist_qft.base_model.skeleton import BaseModel
from dist_qft.quant.contract import Format
from dist_qft.quant.frozen import FrozenWeight

_MEASURED_WEIGHTS = 7  # as many as a decoder layer of the common families has
_MEASURED_NUMBERS = 1 << 17  # of each


@dataclass
class _Group:
    """Weights of one kind that are to be held in one format."""

    kind: str
    format: Format
    stored: Format | None
    names: list[str] = field(default_factory=list)
    weights: list[FrozenWeight] = field(default_factory=list)

    def first(self) -> list[tuple[str, FrozenWeight]]:
        """The weights that are measured."""
        return list(zip(self.names, self.weights, strict=True))[:_MEASURED_WEIGHTS]


def requantization_notes(base: BaseModel, tensors: ModelTensors) -> list[str]:
    """A line for each kind of quantized weight in the files: its stored format, its new format, and the error.

    Reads some rows of the first weights of each kind. Errors are relative to the mean magnitude of the weights.
    """
    return [_note(group, tensors) for group in _groups(base, tensors)]


def _groups(base: BaseModel, tensors: ModelTensors) -> Iterable[_Group]:
    groups: dict[tuple[str, Format], _Group] = {}
    for path, weight in base.weights().items():
        name = f"{path}.weight"
        kind = tensors.kind(name)
        if kind is None:
            continue
        group = groups.setdefault((kind, weight.format), _Group(kind, weight.format, tensors.stored_format(name)))
        group.names.append(name)
        group.weights.append(weight)
    return groups.values()


def _note(group: _Group, tensors: ModelTensors) -> str:
    count = len(group.names)
    what = f"{group.kind} -> {group.format.words}: {count} {'weight' if count == 1 else 'weights'}"
    if group.stored == group.format:
        return f"{what}, value for value"
    if group.stored is not None and group.format.keeps_codes_of(group.stored):
        return f"{what}, codes kept, constants rounded{_rounding(group, group.stored, tensors)}"
    done = "dequantized" if group.format.name == "dense" else "quantized a second time"
    return f"{what}, {done}{_error(group, tensors)}"


def _rounding(group: _Group, stored: Format, tensors: ModelTensors) -> str:
    """The largest change of a weight by rounded constants, in steps of the codes."""
    steps = []
    for name, weight in group.first():
        before = tensors.read_packed(name, (0, _measured_rows(weight, stored)))
        after = group.format.from_stored(before, stored, name)
        steps.append(group.format.rounding_in_steps(before, after))
    known = [step for step in steps if step is not None]
    return f", off by at most {max(known):.2g} of a step" if known else ""


def _error(group: _Group, tensors: ModelTensors) -> str:
    """Mean and largest error relative to the mean magnitude of the weights."""
    total = magnitude = largest = 0.0
    count = 0
    for name, weight in group.first():
        height, width = _measured_rows(weight, group.format), weight.weight_shape[1]
        before = tensors.read_rows(name, 0, height).float()
        packed = group.format.quantize(before, name)
        if group.format.name == "dense":
            packed = {key: tensor.to(weight.dtype) for key, tensor in packed.items()}
        distance = (group.format.dequantize(packed, (height, width), torch.float32).double() - before.double()).abs()
        total += float(distance.sum())
        largest = max(largest, float(distance.max()))
        magnitude += float(before.double().abs().sum())
        count += before.numel()
    if largest == 0.0:
        return " without an error"
    scale = magnitude / count or math.inf
    return f", mean error {total / count / scale:.2%} of the mean weight, largest {largest / scale:.1%}"


def _measured_rows(weight: FrozenWeight, format: Format) -> int:
    height, width = weight.weight_shape
    align = format.row_alignment
    return min(height, max(align, _MEASURED_NUMBERS // width // align * align))
