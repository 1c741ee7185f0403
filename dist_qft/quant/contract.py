"""The contract that every frozen format keeps, and the arithmetic that the formats share.

A format describes and converts one 2-D weight (out_features, in_features). Its packed tensors are ordinary, separately
named tensors whose dim 0 runs over output rows (or row blocks), so an engine shards each of them on dim 0 without
knowing its meaning. A few formats also have small tensors that all rows share. Formats are immutable and hold no
tensors: the modules in `frozen.py` do.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from dist_qft.errors import UserError
from dist_qft.quant.triton_here import triton_obstacle

Shape = tuple[int, int]
CONSTANTS = {"float16": torch.float16, "float32": torch.float32}  # dtypes of block constants by name
PackedShapes = dict[str, tuple[tuple[int, ...], torch.dtype | None]]

# Weights converted at a time. It bounds the float32 temporaries to a few MiB on a CPU, where a chunk also stays in
# cache; a GPU wants fewer, larger kernels.
CPU_CHUNK = 1 << 20
_ACCELERATOR_CHUNK = 1 << 24


@dataclass(frozen=True)
class FoldTarget:
    """The packed tensor into which a change of the weight folds exactly.

    One element of `tensor` is added to each weight of a block of `block` (outputs, inputs).
    """

    tensor: str
    block: tuple[int, int]


class Format(ABC):
    """The storage of one weight of shape (out_features, in_features), and its way back to floats."""

    name: ClassVar[str]

    @property
    def row_local(self) -> bool:
        """True if rows (aligned to `row_alignment`) quantized alone get the same bits as within the whole weight."""
        return True

    @property
    def row_alignment(self) -> int:
        """Rows that share constants: a range of rows can stand alone if both its ends are multiples of this."""
        return 1

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Name and settings as JSON-able data, for fingerprints and adapter_config.json."""

    @abstractmethod
    def check(self, shape: Shape, where: str) -> None:
        """Raise UserError naming `where` (the layer's path) if the format cannot hold a weight of this shape."""

    @abstractmethod
    def packed_shapes(self, shape: Shape) -> PackedShapes:
        """Shape and dtype of each packed tensor by name; dtype None is the model's compute dtype."""

    @abstractmethod
    def rows_per_entry(self, tensor_name: str) -> int | None:
        """Rows of the weight that one dim-0 entry of a packed tensor covers; None if that is not a whole number."""

    def shared(self, tensor_name: str) -> bool:
        """True for a packed tensor that belongs to all rows alike; all others run over the rows along dim 0."""
        return False

    @property
    def row_format(self) -> "Format | None":
        """The row-local format whose tensors of all rows determine this one's; None if this one is `row_local`."""
        return None

    def second_pass(self, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that this format has in place of the whole constants of `row_format`."""
        raise NotImplementedError(f"{self.name} is quantized by rows")

    @property
    def fold_target(self) -> FoldTarget | None:
        """The tensor into which a change that is constant on each block folds exactly; None if there is none."""
        return None

    @property
    def fold_obstacle(self) -> str:
        """The reason why `fold_target` is None, to follow "<layer> is <format name>, "."""
        return "which has no zeros to take dW"

    def rounding_in_steps(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float | None:
        """Largest change of a weight, in steps of its codes, from rounding constants; None if codes have no steps."""
        return None

    def blocks(self, shape: Shape) -> int:
        """Number of blocks of weights that share constants; 0 for a format without constants."""
        return 0

    def row_part(self, packed: Mapping[str, Tensor], shape: Shape, start: int, stop: int) -> dict[str, Tensor]:
        """The rows start..stop of whole packed tensors, in `row_format`."""
        raise NotImplementedError(f"{self.name} is sliced by slice_rows")

    @property
    def words(self) -> str:
        """Name and settings in words, for messages."""
        settings = ((key, value) for key, value in self.describe().items() if value is not False)
        return " ".join(key.replace("_", " ") if value is True else f"{value}" for key, value in settings)

    @property
    def in_stacks(self) -> "Format | None":
        """The format of a table of rows of several weights in this one, value for value; None if there is none.

        It must have for each row what the rows of one weight share.
        """
        return self.row_format or self

    def holds(self, stored: "Format") -> bool:
        """True if `from_stored` takes weights in the format `stored` value for value."""
        return self == stored

    def keeps_codes_of(self, stored: "Format") -> bool:
        """True if `from_stored` can take weights in the format `stored` without finding new codes for them."""
        return self.holds(stored)

    def from_stored(self, packed: Mapping[str, Tensor], stored: "Format", where: str) -> dict[str, Tensor]:
        """The same codes in this format; constants may be rounded. Only if `keeps_codes_of(stored)`."""
        return dict(packed)

    @abstractmethod
    def quantize(self, weight: Tensor, where: str = "weight") -> dict[str, Tensor]:
        """Pack a weight of any float dtype, computing in float32 on the weight's device.

        Raises UserError naming `where` if the shape does not fit, or for a value that is not finite or too large.
        """

    @abstractmethod
    def dequantize(
        self, packed: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        """The weight in `dtype`: computed in float32, then rounded once.

        `out`, if given, is a contiguous tensor of this shape and dtype, and is returned.
        """

    def few_rows(self, dtype: torch.dtype) -> int:
        """The most rows of this dtype that `product` takes; 0 for a format without such a kernel."""
        return 0

    def product(self, packed: Mapping[str, Tensor], shape: Shape, x: Tensor, bias: Tensor | None) -> Tensor:
        """x @ W^T + bias of a few rows x, without gradient, by a kernel that reads the packed weight itself.

        It may round otherwise than a product with the dequantized weight.
        """
        raise NotImplementedError(f"{self.name} has no such kernel")

    def bytes_of(self, shape: Shape, dense_element_size: int = 4) -> int:
        """Bytes of all packed tensors; `dense_element_size` is the size of one element of the compute dtype."""
        return sum(
            prod(tensor_shape) * (dtype.itemsize if dtype is not None else dense_element_size)
            for tensor_shape, dtype in self.packed_shapes(shape).values()
        )

    def slice_rows(self, packed: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
        """Views of the packed tensors that hold the rows start..stop, both multiples of `row_alignment`.

        Tensors that all rows share are passed on whole. Only for a `row_local` format.
        """
        views = {}
        for name, tensor in packed.items():
            rows = self.rows_per_entry(name)
            views[name] = tensor if rows is None else tensor[start // rows : stop // rows]
        return views

    def row_pieces(
        self,
        packed: Mapping[str, Tensor],
        shape: Shape,
        dtype: torch.dtype,
        room: Callable[[Shape], Tensor | None] = lambda shape: None,
    ) -> Iterator[tuple[slice, Tensor]]:
        """The weight in ranges of rows of bounded size, each dequantized when it is asked for.

        Only for a `row_local` format. `room` may give the tensor that a piece of some shape is written to.
        """
        for rows in row_chunks(shape, next(iter(packed.values())).device, self.row_alignment):
            part, size = self.slice_rows(packed, rows.start, rows.stop), (rows.stop - rows.start, shape[1])
            yield rows, self.dequantize(part, size, dtype, room(size))


class BlockFormat(Format):
    """A format whose arithmetic is ours, written for one chunk of rows in float32."""

    @abstractmethod
    def _quantize_rows(self, weight: Tensor, where: str) -> dict[str, Tensor]:
        """Pack whole row blocks, given as finite float32."""

    @abstractmethod
    def _dequantize_rows(self, packed: Mapping[str, Tensor], out: Tensor) -> None:
        """Write whole row blocks into the contiguous float32 tensor `out`."""

    @abstractmethod
    def _dequantize_on_cuda(self, packed: Mapping[str, Tensor], out: Tensor) -> None:
        """Write the whole weight into the contiguous tensor `out` by one Triton kernel, with the same bits."""

    def quantize(self, weight: Tensor, where: str = "weight") -> dict[str, Tensor]:
        shape = (weight.shape[0], weight.shape[1])
        self.check(shape, where)
        packed = {
            name: torch.empty(tensor_shape, dtype=dtype, device=weight.device)
            for name, (tensor_shape, dtype) in self.packed_shapes(shape).items()
        }
        for rows in row_chunks(shape, weight.device, self.row_alignment):
            part = self._quantize_rows(finite_rows(weight, rows, where), where)
            for name, target in self.slice_rows(packed, rows.start, rows.stop).items():
                target.copy_(part[name])
        return packed

    def dequantize(
        self, packed: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        if out is None:
            out = torch.empty(shape, dtype=dtype, device=packed["codes"].device)
        if out.device.type == "cuda" and out.numel() and triton_obstacle() is None:
            self._dequantize_on_cuda(packed, out)
            return out
        for rows in row_chunks(shape, out.device, self.row_alignment):
            part = self.slice_rows(packed, rows.start, rows.stop)
            target = out[rows]
            if target.dtype == torch.float32:
                self._dequantize_rows(part, target)
            else:
                exact = torch.empty_like(target, dtype=torch.float32)
                self._dequantize_rows(part, exact)
                target.copy_(exact)
        return out


def row_entries(entries: int, height: int, first: int, stop: int) -> tuple[int, int]:
    """The dim-0 entries that hold the rows first..stop of `height` rows, in a tensor that runs over them evenly."""
    return first * entries // height, stop * entries // height


def row_chunks(shape: Shape, device: torch.device, alignment: int = 1) -> Iterator[slice]:
    """Consecutive row ranges that cover the weight, each a multiple of `alignment` rows and of bounded size."""
    out_features, in_features = shape
    budget = CPU_CHUNK if device.type == "cpu" else _ACCELERATOR_CHUNK
    step = max(1, budget // (in_features * alignment)) * alignment
    for start in range(0, out_features, step):
        yield slice(start, min(start + step, out_features))


def finite_rows(weight: Tensor, rows: slice, where: str) -> Tensor:
    """These rows of the weight in float32, contiguous; raises UserError for the first value that is not finite."""
    chunk = weight[rows].float().contiguous()
    # One pass in each direction instead of torch.isfinite's five: what is not finite shows in the extremes.
    if chunk.numel() and not torch.isfinite(torch.stack(torch.aminmax(chunk))).all():
        row, column = (~torch.isfinite(chunk)).nonzero()[0].tolist()
        value = chunk[row, column].item()
        raise UserError(
            f"{where}: the weight at [{rows.start + row}, {column}] is {value}, must be a finite float32 value"
        )
    return chunk


def wider_constants(constants: str, stored: str) -> bool:
    """True if block constants of the dtype `constants` have every value of those of the dtype `stored`."""
    return constants in (stored, "float32")


def with_constants(packed: Mapping[str, Tensor], constants: str) -> dict[str, Tensor]:
    """Packed tensors whose block constants have the dtype `constants`, with the codes that they have."""
    dtype = CONSTANTS[constants]
    return {key: tensor if key == "codes" else tensor.to(dtype) for key, tensor in packed.items()}


def float16_constants(constants: Tensor, where: str) -> Tensor:
    """Block constants rounded to float16; raises UserError if one of them does not fit."""
    rounded = constants.half()
    if torch.isinf(rounded).any():
        largest = constants.abs().max().item()
        raise UserError(f"{where}: a block of weights needs a constant of {largest:.6g}, float16 ends at 65504")
    return rounded


def inverse_scale(scale: Tensor) -> Tensor:
    """1 / scale in float32, and 0 where that is not finite: a constant block has only zero codes."""
    inverse = 1.0 / scale
    return inverse.masked_fill_(torch.isinf(inverse), 0.0)
