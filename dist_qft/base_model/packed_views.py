"""The formats of views: in which one a view's rows are held value for value, and its packed tensors in it."""

from collections.abc import Callable

import torch
from torch import Tensor

from dist_qft.base_model.sources import packed_rows_alone
from dist_qft.base_model.tensor_views import Range, Stored, View
from dist_qft.quant.contract import Format


def kind(view: View) -> str | None:
    """The way in which the files quantize the parts of a view, in words for messages; None for floats."""
    kinds = dict.fromkeys(kind for leaf in view.leaves() if (kind := leaf.source.kind(leaf.name)) is not None)
    return " and ".join(kinds) or None


def stored_format(view: View) -> Format | None:
    """The format in which `read_packed` gives the rows of a view, code for code; None if there are none."""
    return _common_format(view, lambda tensor: tensor.source.stored_format(tensor.name))


def kept_format(view: View) -> Format | None:
    """The format that `quantization: auto` holds a view in, as `TensorSource.kept_format` says of each of its parts."""
    return _common_format(view, lambda tensor: tensor.source.kept_format(tensor.name))


def read_packed(view: View, first: int, stop: int) -> dict[str, Tensor]:
    """The packed tensors of the rows first..stop of a view that has a `stored_format`."""
    runs, format = view.runs() or [], stored_format(view)
    if len(runs) == 1 and runs[0].whole:
        return runs[0].tensor.source.read_packed(runs[0].tensor.name, (first, stop))
    pieces: list[dict[str, Tensor]] = []
    start = 0
    for run in runs:
        size = run.stop - run.first
        inside = max(first - start, 0), min(stop - start, size)
        if inside[0] < inside[1] or (first == stop and not pieces):
            rows = run.first + inside[0], run.first + max(inside)
            pieces.append(_as_in_stack(run.tensor, rows, format))
        start += size
    if len(pieces) == 1:
        return pieces[0]
    return {key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]}


def _as_in_stack(tensor: Stored, rows: Range, format: Format | None) -> dict[str, Tensor]:
    """Rows of a stored tensor in the format of the view that they are a part of."""
    stored = tensor.source.stored_format(tensor.name)
    if stored is None or format is None:
        raise ValueError(f"'{tensor.name}' is not packed")
    alone, packed = packed_rows_alone(tensor.source, tensor.name, stored, rows)
    return format.from_stored(packed, alone, f"'{tensor.name}'")


def _common_format(view: View, format_of: Callable[[Stored], Format | None]) -> Format | None:
    """The format that holds all rows that make up a view value for value; None if none of theirs does."""
    runs = view.runs() or []
    formats = [format_of(run.tensor) for run in runs]
    if len(runs) == 1 and runs[0].whole:
        return formats[0]
    stacked = dict.fromkeys(None if format is None else format.in_stacks for format in formats)
    for format in stacked:
        if format is not None and all(other is not None and format.holds(other) for other in stacked):
            align = format.row_alignment
            return format if all(run.first % align == 0 == run.stop % align for run in runs) else None
    return None
