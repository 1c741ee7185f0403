"""Modules that hold a packed weight and compute with it: the frozen linear layer and the frozen embedding.

Packed tensors are `nn.Parameter`s without gradient, not buffers, because FSDP2 and ZeRO shard parameters only. A module
starts on the meta device; whoever loads the model fills in its tensors, and an engine may swap them at any time:
everything here reads the module's current attributes, when it computes and not before.
"""

import threading
from collections.abc import Callable, Iterator
from math import nan, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from dist_qft.quant.contract import CPU_CHUNK, BlockFormat, Format, Shape
from dist_qft.quant.row_update import ChangedRows


class FrozenWeight(nn.Module):
    """One weight (rows, columns) in a packed format; parameter names are the format's tensor names.

    `dtype` is the compute dtype, in which the weight comes back. `in_use`, if set, maps the packed tensors to those
    that `dequantize` reads instead. Raises UserError if the format cannot hold the shape.
    """

    def __init__(self, shape: Shape, format: Format, dtype: torch.dtype, device: torch.device | str = "meta") -> None:
        super().__init__()
        format.check(shape, type(self).__name__)
        self.weight_shape = shape
        self.format = format
        self.dtype = dtype
        self.transposed = False  # whether the library's own model has columns before rows
        self.in_use: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
        self._packed_dtypes: dict[str, torch.dtype] = {}
        for name, (tensor_shape, packed_dtype) in format.packed_shapes(shape).items():
            self._packed_dtypes[name] = packed_dtype or dtype
            self.register_parameter(name, _frozen(tensor_shape, packed_dtype or dtype, device))

    @property
    def full_shape(self) -> tuple[int, ...]:
        """The weight's shape with every dimension that it has; `weight_shape` counts all but the last as rows."""
        return self.weight_shape

    def packed(self) -> dict[str, Tensor]:
        """The packed tensors as they are now; raises TypeError if one was cast.

        `module.bfloat16()` and an engine's mixed precision cast the floating-point tensors: the block constants.
        """
        tensors = {}
        for name, dtype in self._packed_dtypes.items():
            tensors[name] = getattr(self, name)
            if tensors[name].dtype != dtype:
                raise TypeError(
                    f"packed tensor '{name}' ({self.format.name}) was cast from {dtype} to {tensors[name].dtype}; "
                    "a frozen module cannot change its dtype"
                )
        return tensors

    def dequantize(self) -> Tensor:
        """The weight (rows, columns) in the compute dtype. Not to be written to: `dense` returns its own tensor."""
        return self.format.dequantize(self._packed_in_use(), self.weight_shape, self.dtype)

    def rows(self, start: int, stop: int) -> Tensor:
        """The rows start..stop of the weight in the compute dtype, not to be written to.

        Converts these rows alone, or the whole weight if its format does not allow that.
        """
        if not self.rows_alone:
            return self.dequantize()[start:stop]
        return self._rows_of(self.packed(), start, stop)

    @property
    def rows_alone(self) -> bool:
        """True if some rows can be converted without the others."""
        return self.format.row_format is not None or self.format.row_local

    def _rows_of(self, packed: dict[str, Tensor], start: int, stop: int) -> Tensor:
        """The rows start..stop of a weight whose packed tensors these are; only with `rows_alone`."""
        alignment = self.format.row_alignment
        first = start // alignment * alignment
        last = -(-stop // alignment) * alignment
        format, part = self._packed_rows(packed, first, last)
        weight = format.dequantize(part, (last - first, self.weight_shape[1]), self.dtype)
        return weight[start - first : stop - first]

    def _packed_rows(self, packed: dict[str, Tensor], start: int, stop: int) -> tuple[Format, dict[str, Tensor]]:
        """The rows start..stop of these packed tensors, and their format; both are multiples of its `row_alignment`."""
        if self.format.row_format is None:
            return self.format, self.format.slice_rows(packed, start, stop)
        return self.format.row_format, self.format.row_part(packed, self.weight_shape, start, stop)

    def fuses(self, rows: int, x: Tensor) -> bool:
        """True if the format's own `product` is for so many rows of x: in generation, a token at a time, on a GPU."""
        few = 0 < rows <= self.format.few_rows(x.dtype) and x.dtype == self.dtype
        return few and x.device.type == "cuda" and not torch.is_grad_enabled()

    def _packed_in_use(self) -> dict[str, Tensor]:
        packed = self.packed()
        return packed if self.in_use is None else self.in_use(packed)

    def extra_repr(self) -> str:
        return f"{self.weight_shape[0]}, {self.weight_shape[1]}, format={self.format.describe()}, dtype={self.dtype}"


class FrozenLinear(FrozenWeight):
    """x @ W^T + bias with a packed W (out_features, in_features) and an optional bias (out_features) in `dtype`.

    x has shape (..., in_features) and dtype `dtype`; another dtype is an error of the matrix product, never a cast.
    Only x receives a gradient.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        format: Format,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str = "meta",
        *,
        transposed: bool = False,
    ) -> None:
        super().__init__((out_features, in_features), format, dtype, device)
        self.transposed = transposed
        self.in_features = in_features
        self.out_features = out_features
        self.register_parameter("bias", _frozen((out_features,), dtype, device) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        if self.fuses(x.shape[:-1].numel(), x):
            return self.format.product(self._packed_in_use(), self.weight_shape, x, self.bias)
        return _FrozenProduct.apply(x, self)

    def passing(self) -> Tensor:
        """The weight as `dequantize` has it, for a product at once: the next call may write over it."""
        packed = self._packed_in_use()
        return self.format.dequantize(packed, self.weight_shape, self.dtype, self._room(self.weight_shape))

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight in ranges of rows, each dequantized when asked for, over the one before; only with `in_pieces`."""
        return self.format.row_pieces(self._packed_in_use(), self.weight_shape, self.dtype, self._room)

    def _room(self, shape: Shape) -> Tensor | None:
        """Memory of this thread for a weight of this shape that is used at once; None where a new block is as good.

        On CPUs the system would hand out a block of some MiB with fresh pages, and their faults cost as much as a
        pass over it.
        """
        size = prod(shape)
        if not (self._in_float32_on_cpu and isinstance(self.format, BlockFormat)) or size > CPU_CHUNK:
            return None
        if not hasattr(_SCRATCH, "weight"):
            with torch.inference_mode(False):  # an inference tensor could be written to in that mode alone
                _SCRATCH.weight = torch.empty(CPU_CHUNK)
        return _SCRATCH.weight[:size].view(shape)

    @property
    def in_pieces(self) -> bool:
        """True if products with this weight are best made of pieces: on CPUs, in float32, if it has more than one.

        A piece stays in the cache between its dequantization and its product, and no block of some 10 MiB, of fresh
        pages each time, is ever asked for. With 16-bit types sums over pieces would be rounded once per piece.
        """
        many = prod(self.weight_shape) > CPU_CHUNK and self.format.row_local
        return many and self._in_float32_on_cpu

    @property
    def _in_float32_on_cpu(self) -> bool:
        return self.dtype == torch.float32 and next(self.parameters()).device.type == "cpu"


_SCRATCH = threading.local()


class _ProductContext(FunctionCtx):
    """The context of a `_FrozenProduct`."""

    module: FrozenLinear


class _FrozenProduct(torch.autograd.Function):
    """A product that dequantizes its weight, again for the gradient, and saves no tensor in between.

    The context keeps the module, not its packed tensors: an engine frees the gathered ones after the forward pass and
    puts others in their place before the backward pass.
    """

    @staticmethod
    def forward(ctx: _ProductContext, x: Tensor, module: FrozenLinear) -> Tensor:
        ctx.module = module
        if not module.in_pieces:
            return F.linear(x, module.passing(), module.bias)
        flat = x.reshape(-1, module.in_features)
        product = flat.new_empty(len(flat), module.out_features)
        for rows, weight in module.pieces():
            torch.mm(flat, weight.t(), out=product[:, rows])
        if module.bias is not None:
            product += module.bias
        return product.view(*x.shape[:-1], module.out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: _ProductContext, grad_output: Tensor) -> tuple[Tensor, None]:
        module = ctx.module
        if not module.in_pieces:
            return grad_output @ module.passing(), None
        flat = grad_output.reshape(-1, module.out_features)
        grad_input = flat.new_zeros(len(flat), module.in_features)
        for rows, weight in module.pieces():
            grad_input.addmm_(flat[:, rows], weight)
        return grad_input.view(*grad_output.shape[:-1], module.in_features), None


class FrozenEmbedding(FrozenWeight):
    """Rows of a packed table (num_embeddings, embedding_dim) by id; only the rows looked up are dequantized.

    `scale`, rounded to `dtype`, multiplies the rows that are looked up (Gemma: sqrt(hidden size)), not those of `rows`,
    which a tied LM head uses. Needs a format that stores each row by itself (q8_0, dense). `padding_idx` is only kept.
    The `bias` (num_embeddings) is that of an LM head that owns the table. `changed`, if set, has other values for some
    rows, which all readers but `dequantize` see.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        format: Format,
        dtype: torch.dtype,
        padding_idx: int | None = None,
        scale: float | None = None,
        device: torch.device | str = "meta",
        *,
        bias: bool = False,
    ) -> None:
        super().__init__((num_embeddings, embedding_dim), format, dtype, device)
        self.register_parameter("bias", _frozen((num_embeddings,), dtype, device) if bias else None)
        if any(format.rows_per_entry(name) != 1 for name in self._packed_dtypes):
            raise ValueError(f"an embedding needs a format that stores each row by itself, got {format.describe()}")
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.output_scale = None if scale is None else torch.tensor(scale, dtype=dtype, device="cpu").item()
        self.changed: ChangedRows | None = None
        self.steps: list[str] = []

    def follow(self, name: str, module: nn.Module) -> None:
        """Apply a module (a norm) to the rows that are looked up, after `scale`; it becomes the child `name`."""
        self.add_module(name, module)
        self.steps.append(name)

    def stand_in(self) -> Tensor:
        """A tensor with the table's shape, compute dtype and device, all NaN: for code that asks for these alone."""
        device = next(self.parameters()).device
        return torch.full((1, 1), nan, dtype=self.dtype, device=device).expand(self.weight_shape)

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and "steps" in self.__dict__ and name not in self._packed_dtypes:
            return self.stand_in()
        return super().__getattr__(name)

    def forward(self, ids: Tensor, use: Callable[["FrozenEmbedding", Tensor], Tensor] | None = None) -> Tensor:
        """Rows (..., embedding_dim) of integer ids (...) in the compute dtype, without autograd.

        If `use` is given, call `use(self, ids)` and return its result; `ids` is then any tensor. Engines gather this
        module's tensors only during its forward pass, so a tied LM head must read the table (by `rows`) inside such a
        call. The result must be one tensor, because hooks that other libraries place on an embedding expect one.
        """
        if use is not None:
            return use(self, ids)
        rows = self.rows_of(ids.reshape(-1))
        if self.output_scale is not None:
            rows = rows * self.output_scale
        for name in self.steps:
            rows = self.get_submodule(name)(rows)
        return rows.view(*ids.shape, self.embedding_dim)

    def rows(self, start: int, stop: int) -> Tensor:
        """The rows start..stop in the compute dtype, not to be written to, without `output_scale`."""
        rows = super().rows(start, stop)
        return rows if self.changed is None else self.changed.between(rows, start, stop)

    def rows_of(self, ids: Tensor) -> Tensor:
        """Rows (n, embedding_dim) of ids (n,) in the compute dtype, without `output_scale`."""
        packed = {name: tensor.index_select(0, ids) for name, tensor in self.packed().items()}
        rows = self.format.dequantize(packed, (len(ids), self.embedding_dim), self.dtype)
        return rows if self.changed is None else self.changed.among(rows, ids)


def _frozen(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
