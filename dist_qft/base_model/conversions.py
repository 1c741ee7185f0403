"""The tensors of the model, made of those of a checkpoint's files by transformers' own table of conversions.

A published checkpoint may name and cut its tensors as another version of the library, or another program, did. The
library's table (`transformers.conversion_mapping`) has the new name of each tensor, and says which ones are stacked,
joined, split or turned on the way; `from_pretrained` applies it to whole tensors. Here the same table is applied to
`View`s, so that a rank still reads only the rows it keeps.
"""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    Interleave,
    MergeModulelist,
    PermuteForRope,
    Split,
    Transpose,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D

from dist_qft.base_model.mixtures import expert_stacks
from dist_qft.base_model.sources import TensorSource
from dist_qft.base_model.stored_head import tied_tables
from dist_qft.base_model.tensor_views import Joined, Part, Reordered, Stacked, Stored, View, swapped

# While a chain of operations runs: a source or target pattern, and the tensors that go by it.
_Collected = dict[str, list[View]]
_Shapes = Mapping[str, Sequence[int]]


class Conversions:
    """The conversions of one model, taken from it while its modules are still the library's.

    Attributes:
        shapes: of every tensor of the model's state, by the library's name.
    """

    def __init__(self, causal: PreTrainedModel) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(t.shape) for name, t in causal.state_dict().items()}
        self._applied: tuple[TensorSource, dict[str, View], dict[str, str]] | None = None  # the last, it is asked again
        self._prefix = causal.base_model_prefix
        self._config = causal.config
        self._experts = {stack.path: stack.transposed for stack in expert_stacks(causal)}
        self._tied = tied_tables(causal)
        self._turned = [f"{path}.weight" for path, module in causal.named_modules() if isinstance(module, Conv1D)]
        self._transforms: list[WeightTransform] = get_model_conversion_mapping(causal) or []

    def apply(self, source: TensorSource) -> tuple[dict[str, View], dict[str, str]]:
        """The model's tensors that the source's tensors make up, and the new name of each tensor of the source.

        Tensors that become one have one name; a name that the model has not is given too. A stack of experts goes, like
        any packed weight, by its path and `.weight`, and has outputs before inputs, as the weight of a `Conv1D` has.
        An embedding that the files hold only as the LM head tied to it is that head, as in the library.
        """
        if self._applied is None or self._applied[0] is not source:
            self._applied = source, *self._apply(source)
        return self._applied[1:]

    def _apply(self, source: TensorSource) -> tuple[dict[str, View], dict[str, str]]:
        transforms = copy.deepcopy(self._transforms)  # they note what they have matched
        renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        views: dict[str, View] = {}
        collected: dict[str, tuple[WeightConverter, _Collected, list[str]]] = {}
        renamed: dict[str, str] = {}
        for name in sorted(source.names(), key=dot_natural_key):
            stack = name.removesuffix(".weight")
            if stack != name and stack in self._experts:  # a folder that we wrote
                renamed[name], views[name] = stack, Stored(source, name)
                continue
            new, pattern = rename_source_key(name, renamings, converters, self._prefix, self.shapes)
            if new not in self.shapes and name in self.shapes:
                new, pattern = name, None
            renamed[name] = new
            if new not in self.shapes:
                continue
            if pattern is None:
                views.setdefault(new, Stored(source, name))
                continue
            _, parts, names = collected.setdefault(new, (by_pattern[pattern], {}, []))
            parts.setdefault(pattern, []).append(Stored(source, name))
            names.append(name)
        for first, (converter, parts, names) in collected.items():
            if _complete(names):
                views |= _converted(converter, parts, first, self.shapes, self._config)
        for path in self._experts.keys() & views.keys():
            view = views.pop(path)
            views[f"{path}.weight"] = swapped(view, 1, 2) if self._experts[path] else view
        for name in self._turned:
            whole = views.get(name)
            packed = isinstance(whole, Stored) and whole.source.stored_format(whole.name) is not None
            if whole is not None and not packed:  # a folder that we wrote has outputs before inputs
                views[name] = swapped(whole, 0, 1)
        if self._tied is not None:
            table, head = self._tied
            if table not in views and head in views:
                views[table] = views[head]
        return views, renamed


def _complete(names: Sequence[str]) -> bool:
    """True if numbered tensors that become one stack have no gap: numbers 0 to n - 1, and as many of each kind.

    The number that counts is the part of the dotted name in which two names of a kind differ.
    """
    kinds: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    for name in names:
        parts = name.split(".")
        kind = tuple("#" if part.isdecimal() else part for part in parts)
        kinds.setdefault(kind, []).append(tuple(int(part) for part in parts if part.isdecimal()))
    for found in kinds.values():
        for values in zip(*found, strict=True):
            if len(set(values)) > 1 and sorted(values) != list(range(len(found))):
                return False
    return len({len(found) for found in kinds.values()}) == 1


def _converted(
    converter: WeightConverter, parts: _Collected, first: str, shapes: _Shapes, config: object
) -> dict[str, View]:
    """The result of a chain of operations on the tensors it has collected; empty if an operation is not known here.

    first: the model's name of the first tensor that comes out, from which the others' names follow.
    """
    for operation in converter.operations:
        step = next((step for kind, step in _STEPS.items() if type(operation) is kind), None)
        if step is None:
            return {}
        try:
            parts = step(operation, parts, converter, first, shapes, config)
        except _NotSupported:
            return {}
    full = first.replace("*.", "0.")
    pattern = next((key for key in parts if key in full), None)
    if pattern is None:
        return {}
    prefix, _, suffix = full.partition(pattern)
    return {prefix + key + suffix: views[0] for key, views in parts.items()}


class _NotSupported(Exception):
    """An operation in a place, or with tensors, that the library itself does not define."""


_Step = Callable[[Any, _Collected, WeightConverter, str, _Shapes, object], _Collected]


def _only(parts: _Collected) -> View:
    """The one tensor that an operation on one tensor works on."""
    if len(parts) != 1:
        raise _NotSupported
    return next(iter(parts.values()))[0]


def _target(converter: WeightConverter, parts: _Collected) -> str:
    """Under which pattern the result of an operation on one tensor goes on."""
    targets = converter.target_patterns
    return targets[0] if len(targets) == 1 else next(iter(parts))


def _stack(
    operation: Any, parts: _Collected, converter: WeightConverter, first: str, shapes: _Shapes, config: object
) -> _Collected:
    if operation.dim != 0 or len(converter.target_patterns) != 1:
        raise _NotSupported
    stacked: _Collected = {}
    for pattern, views in parts.items():
        if len({view.shape for view in views}) != 1:
            raise _NotSupported
        stacked[converter.target_patterns[0] if len(parts) == 1 else pattern] = [Stacked(tuple(views))]
    return stacked


def _join(
    operation: Any, parts: _Collected, converter: WeightConverter, first: str, shapes: _Shapes, config: object
) -> _Collected:
    views = tuple(itertools.chain.from_iterable(parts.get(pattern, []) for pattern in converter.source_patterns))
    dim = operation.dim
    rest = {view.shape[:dim] + view.shape[dim + 1 :] for view in views}
    if len(converter.target_patterns) != 1 or len(rest) != 1 or dim < 0:
        raise _NotSupported
    return {converter.target_patterns[0]: [Joined(views, dim)]}


def _chunk(
    operation: Any, parts: _Collected, converter: WeightConverter, first: str, shapes: _Shapes, config: object
) -> _Collected:
    whole, targets = _only(parts), converter.target_patterns
    if operation.num_shards_attribute is not None:
        raise _NotSupported
    size = -(-whole.shape[operation.dim] // len(targets))
    return _cut(whole, operation.dim, targets, [size] * len(targets))


def _split(
    operation: Any, parts: _Collected, converter: WeightConverter, first: str, shapes: _Shapes, config: object
) -> _Collected:
    targets = converter.target_patterns
    sizes = [shapes[first.replace(targets[0], target)][operation.dim] for target in targets]
    return _cut(_only(parts), operation.dim, targets, sizes)


def _cut(whole: View, dim: int, targets: Sequence[str], sizes: Sequence[int]) -> _Collected:
    stops = list(itertools.accumulate(sizes))
    starts = [0, *stops[:-1]]
    end = whole.shape[dim]
    pieces = zip(targets, starts, stops, strict=True)
    return {target: [Part(whole, dim, start, min(stop, end))] for target, start, stop in pieces}


def _transpose(
    operation: Any, parts: _Collected, converter: WeightConverter, first: str, shapes: _Shapes, config: object
) -> _Collected:
    view, target = _only(parts), _target(converter, parts)
    if operation.check_dims and view.shape == tuple(shapes.get(first, ())):
        return {target: [view]}
    return {target: [swapped(view, operation.dim0, operation.dim1)]}


def _deinterleave(
    operation: Any, parts: _Collected, converter: WeightConverter, first: str, shapes: _Shapes, config: object
) -> _Collected:
    view = _only(parts)
    size = view.shape[operation.dim]
    halves = (2, size // 2) if operation.inverse else (size // 2, 2)
    order = torch.arange(size).view(halves).T.reshape(-1)
    return {converter.target_patterns[0]: [Reordered(view, operation.dim, order)]}


def _permute_for_rope(
    operation: Any, parts: _Collected, converter: WeightConverter, first: str, shapes: _Shapes, config: object
) -> _Collected:
    """Rotary pairs that lie side by side, moved to the two halves of each head."""
    source = getattr(config, operation.subconfig_key, config) if operation.subconfig_key else config
    heads = getattr(source, "num_attention_heads", 1)
    alone = len(parts) == 1 and len(converter.source_patterns) == len(converter.target_patterns) == 1
    permuted: _Collected = {}
    for pattern, views in parts.items():
        view, names = views[0], operation.permute_layer_names
        if names is None or any(name in pattern for name in names):
            size = view.shape[0]
            head = (2, size // heads // 2) if operation.inverse else (size // heads // 2, 2)
            view = Reordered(view, 0, torch.arange(size).view(heads, *head).transpose(1, 2).reshape(-1))
        permuted[converter.target_patterns[0] if alone else pattern] = [view]
    return permuted


_STEPS: dict[type[ConversionOps], _Step] = {
    MergeModulelist: _stack,
    Concatenate: _join,
    Chunk: _chunk,
    Split: _split,
    Transpose: _transpose,
    Interleave: _deinterleave,
    PermuteForRope: _permute_for_rope,
}
